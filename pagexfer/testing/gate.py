"""A vCPU gate without vCPUs: what stands for each is a few bytes of state."""

from __future__ import annotations

from ..errors import GateError


class BytesGate:
    """`svsm.gate.VcpuGate` over one bytes object a vCPU; an empty one is a vCPU that waits for a state.

    `states` is what the vCPUs have now, `running` whether they run, and `slow` the vCPUs that see the global flag and have
    not raised their own yet: take them out to let them park. A gate of a guest that is yet to come starts parked.
    """

    def __init__(self, states: list[bytes], *, running: bool) -> None:
        self.states = list(states)
        self.running = running
        self.slow: set[int] = set()
        self._flag = not running

    @classmethod
    def waiting(cls, vcpus: int) -> BytesGate:
        """The gate of a destination: vCPUs that never ran."""
        return cls([b""] * vcpus, running=False)

    @property
    def vcpus(self) -> int:
        return len(self.states)

    def raise_flag(self) -> None:
        self._flag = True

    def parked(self) -> int:
        if not self._flag:
            return 0
        parked = self.vcpus - len(self.slow)
        self.running = self.running and parked < self.vcpus
        return parked

    def save_state(self, vcpu: int) -> bytes:
        self._check_parked(vcpu)
        if not self.states[vcpu]:
            raise GateError(f"vCPU {vcpu} has no state yet")
        return self.states[vcpu]

    def load_state(self, vcpu: int, state: bytes) -> None:
        self._check_parked(vcpu)
        self.states[vcpu] = state

    def release(self) -> None:
        if not self._flag:
            return
        if not all(self.states):
            raise GateError("a vCPU cannot be released: load its state first")
        self._flag = False
        self.running = True

    def _check_parked(self, vcpu: int) -> None:
        if not self._flag or vcpu in self.slow:
            raise GateError(f"vCPU {vcpu} is not parked")
