"""Layout of the control page, where the gate and the vCPU processes of a simulated guest meet.

The page is the SVSM's private memory: it is no part of guest RAM and is never migrated. In uint64 words:

    0        magic
    1        generation: odd while the global flag is up, raised by one with every change of the flag
    2        number of vCPUs
    3        write rate of the whole guest, bytes a second
    4        throttle: percentage of time in which no vCPU runs
    32 ..    one block of 32 words a vCPU:
               0          own flag: the generation for which this vCPU has parked
               8 .. 23    registers (`registers.Registers`), zero as long as the vCPU has none

A generation and not a plain flag, because a flag that is lowered and raised again before a vCPU looks would
leave the own flag of the first time standing for the second. Each word has one writer: the own flag and,
until it is parked, the registers are the vCPU's, all else is the gate's and the hypervisor's. A vCPU stores
its registers before its own flag, and x86 keeps the order of stores.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final

import numpy as np

from .registers import REGISTERS_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC: Final = 0x4C52_5443_5547_5355
_WORD_MAGIC: Final = 0
_WORD_GENERATION: Final = 1
_WORD_VCPUS: Final = 2
_WORD_RATE: Final = 3
_WORD_THROTTLE: Final = 4
_BLOCK_WORDS: Final = 32
_BLOCK_FLAG: Final = 0
_BLOCK_REGISTERS: Final = 8

_WORD_BYTES: Final = 8
_REGISTERS_WORDS: Final = REGISTERS_BYTES // _WORD_BYTES
assert _BLOCK_REGISTERS + _REGISTERS_WORDS <= _BLOCK_WORDS

MAX_RATE: Final = 2**63  # bytes a second: faster than any memory, and still a word


class ControlPage:
    """A mapping of one guest's control page, on either side."""

    def __init__(self, control_fd: int) -> None:
        self.fd = control_fd
        size = os.fstat(control_fd).st_size
        mapping = mmap.mmap(control_fd, size, mmap.MAP_SHARED)
        self._words: NDArray[np.uint64] = np.frombuffer(mapping, dtype=np.uint64)
        if int(self._words[_WORD_MAGIC]) != _MAGIC:
            raise ValueError("this memory holds no control page")

    @classmethod
    def create(cls, vcpus: int, rate: int) -> ControlPage:
        """A control page in its own memfd. The global flag is up: a vCPU that starts on it parks first."""
        control_fd = os.memfd_create("guest-control", os.MFD_CLOEXEC)
        words = np.zeros(_BLOCK_WORDS * (1 + vcpus), dtype=np.uint64)
        words[:4] = (_MAGIC, 1, vcpus, rate)
        try:
            os.write(control_fd, words.tobytes())
            return cls(control_fd)
        except BaseException:
            os.close(control_fd)
            raise

    def close(self) -> None:
        """Give the memfd back; the mapping ends with this object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def vcpus(self) -> int:
        return int(self._words[_WORD_VCPUS])

    @property
    def rate(self) -> int:
        """Write rate of the whole guest, bytes a second; 0 for an idle guest."""
        return int(self._words[_WORD_RATE])

    @rate.setter
    def rate(self, bytes_per_second: int) -> None:
        self._words[_WORD_RATE] = bytes_per_second

    @property
    def throttle(self) -> int:
        """Percentage of time in which no vCPU runs."""
        return int(self._words[_WORD_THROTTLE])

    @throttle.setter
    def throttle(self, percentage: int) -> None:
        self._words[_WORD_THROTTLE] = percentage

    @property
    def generation(self) -> int:
        return int(self._words[_WORD_GENERATION])

    @property
    def flag_up(self) -> bool:
        """Whether the global flag is up."""
        return self.generation % 2 == 1

    def turn_flag(self) -> None:
        """Raise a lowered global flag, or lower a raised one."""
        self._words[_WORD_GENERATION] = self.generation + 1

    def own_flag(self, vcpu: int) -> int:
        """The generation for which `vcpu` has parked last; 0 before it ever has."""
        return int(self._words[self._block(vcpu) + _BLOCK_FLAG])

    def set_own_flag(self, vcpu: int, generation: int) -> None:
        self._words[self._block(vcpu) + _BLOCK_FLAG] = generation

    def registers(self, vcpu: int) -> bytes | None:
        """A copy of the 128 bytes of registers, or None where the vCPU has none yet."""
        start = self._block(vcpu) + _BLOCK_REGISTERS
        data = self._words[start : start + _REGISTERS_WORDS].tobytes()
        return data if any(data) else None

    def set_registers(self, vcpu: int, data: bytes) -> None:
        start = self._block(vcpu) + _BLOCK_REGISTERS
        self._words[start : start + _REGISTERS_WORDS] = np.frombuffer(data, dtype=np.uint64)

    def _block(self, vcpu: int) -> int:
        return _BLOCK_WORDS * (1 + vcpu)
