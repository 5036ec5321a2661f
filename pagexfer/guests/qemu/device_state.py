"""The device state of a QEMU: what must be equal at both ends, then QEMU's own migration stream without RAM.

QEMU leaves RAM out of its stream by the capability `x-ignore-shared`. The stream comes and goes over a socket whose other
end QEMU gets with `getfd`, so nothing in the file system, and nobody else, can be in between.
"""

from __future__ import annotations

import socket
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from ...errors import GuestError, MalformedData
from .qmp import QmpBroken
from .values import record, records

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .backends import Backend
    from .gate import CpuModel
    from .qmp import QmpClient

# magic u32 "QEMU", version u16, number of backends u16, bytes of the machine's type u16, bytes of the vCPUs' u16; for each
# backend size u64 and size of its memory's pages u64; the machine's type and the vCPUs' in UTF-8; the stream.
_HEADER: Final = struct.Struct("<IHHHH")
_BACKEND: Final = struct.Struct("<QQ")
assert (_HEADER.size, _BACKEND.size) == (12, 16)
_MAGIC: Final = 0x554D_4551
_VERSION: Final = 2

MAX_STREAM_BYTES: Final = 256 << 20
# States of QEMU's own migration in which there is none.
OVER: Final = (None, "none", "completed", "cancelled", "failed")
_FD_NAME: Final = "pagexfer-devices"
_RECEIVE_BYTES: Final = 1 << 18
# QEMU's default of 128 MiB/s would make video memory alone a good part of the black-out.
_BANDWIDTH: Final = 1 << 40
_POLL_S: Final = 0.002
# A QEMU that was told to cancel needs moments, and its guest waits to be continued.
_CANCEL_TIMEOUT_S: Final = 5.0
_IGNORE_SHARED: Final = "x-ignore-shared"
_LATE_BLOCK_ACTIVATE: Final = "late-block-activate"
_NOT_TAKEN: Final = (
    "this QEMU did not take the device state, and its output says why: both need the same devices"
)


@dataclass(frozen=True, slots=True)
class Platform:
    """What source and destination must have in common, as far as QEMU itself does not say so clearly."""

    machine: str
    cpus: str
    backends: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, machine: str, models: tuple[CpuModel, ...], backends: tuple[Backend, ...]) -> Platform:
        cpus = ", ".join(sorted({model.qom_type for model in models}))
        return cls(machine, cpus, tuple((backend.size, backend.page_bytes) for backend in backends))

    def pack(self) -> bytes:
        names = self.machine.encode(), self.cpus.encode()
        header = _HEADER.pack(_MAGIC, _VERSION, len(self.backends), *map(len, names))
        return b"".join([header, *(_BACKEND.pack(*backend) for backend in self.backends), *names])

    def check_accepts(self, source: Platform) -> None:
        """Raises GuestError, with what differs, where a guest of `source` cannot run here."""
        if source.machine != self.machine:
            raise GuestError(
                f"the source's machine is a {source.machine}, the destination's a {self.machine}"
            )
        if source.cpus != self.cpus:
            raise GuestError(f"the source's vCPUs are {source.cpus}, the destination's {self.cpus}")
        if [size for size, _ in source.backends] != [size for size, _ in self.backends]:
            raise GuestError("the memory backends of source and destination differ in number or size")
        if source.backends != self.backends:
            raise GuestError("the memory backends of source and destination differ in their (huge) page size")


def split_state_untrusted(state: bytes) -> tuple[Platform, bytes]:
    """What the source is, and QEMU's stream. Raises MalformedData."""
    if len(state) < _HEADER.size:
        raise MalformedData(f"QEMU device state of {len(state)} bytes")
    magic, version, count, machine_bytes, cpus_bytes = _HEADER.unpack_from(state)
    if (magic, version) != (_MAGIC, _VERSION):
        raise MalformedData("this is not of a QEMU, or of another version of its device state")
    machine_at = _HEADER.size + count * _BACKEND.size
    cpus_at = machine_at + machine_bytes
    stream_at = cpus_at + cpus_bytes
    if len(state) < stream_at:
        raise MalformedData("QEMU device state is cut off")
    backends = tuple(
        _BACKEND.unpack_from(state, _HEADER.size + index * _BACKEND.size) for index in range(count)
    )
    try:
        machine, cpus = state[machine_at:cpus_at].decode(), state[cpus_at:stream_at].decode()
    except UnicodeDecodeError:
        machine = cpus = "\n"
    if not (machine + cpus).isprintable():
        raise MalformedData("QEMU device state with names that are no text")
    return Platform(machine, cpus, backends), state[stream_at:]


async def save_stream(qmp: QmpClient, on_begun: Callable[[], None]) -> bytes:
    """QEMU's own migration stream of a stopped machine, without shared RAM. Raises GuestError where QEMU fails.

    Calls `on_begun` once QEMU has begun to save: from then on it may be "postmigrate".
    """
    bandwidth = record(await qmp.execute("query-migrate-parameters")).get("max-bandwidth")
    async with _capabilities_on(qmp, _IGNORE_SHARED):
        try:
            await qmp.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
            with await _hand_over(qmp) as link:
                await qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
                on_begun()
                stream = await _receive_all(link)
            await _wait_completed(qmp)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(GuestError):
                await _cancel(qmp)
            raise
        finally:
            with trio.CancelScope(shield=True), suppress(GuestError):
                await qmp.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
    return stream


async def load_stream(qmp: QmpClient, stream: bytes) -> None:
    """Have a QEMU that waits for it take a stream over. Raises GuestError where it does not fit.

    It does not open disks for writing before it runs, so that the source can have them back where it never does.
    """
    async with _capabilities_on(qmp, _IGNORE_SHARED, _LATE_BLOCK_ACTIVATE):
        with await _hand_over(qmp) as link:
            await qmp.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
            try:
                sent = 0
                while sent < len(stream):
                    sent += await link.send(stream[sent:])
                link.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise GuestError(f"{_NOT_TAKEN}: {error.strerror}") from error
            try:
                await _wait_completed(qmp)
            except QmpBroken as error:  # it ends where it meets anything that it does not have
                raise GuestError(f"{_NOT_TAKEN}: {error}") from error


@asynccontextmanager
async def _capabilities_on(qmp: QmpClient, *names: str) -> AsyncIterator[None]:
    """For the time of the block QEMU's own migration has these on; then they are as they were, however the block ended."""
    were_on = {
        capability.get("capability")
        for capability in records(await qmp.execute("query-migrate-capabilities"))
        if capability.get("state") is True
    }
    changed = [name for name in names if name not in were_on]
    try:
        await _set_capabilities(qmp, *changed, on=True)
        yield
    finally:
        # Also where it is not known whether they were switched on: QEMU may do what nobody waits for any more.
        with trio.CancelScope(shield=True), suppress(GuestError):
            await _set_capabilities(qmp, *changed, on=False)


async def _cancel(qmp: QmpClient) -> None:
    """End an outgoing migration. Before its end QEMU refuses to have its capabilities changed."""
    await qmp.execute("migrate_cancel")
    with trio.move_on_after(_CANCEL_TIMEOUT_S):
        while record(await qmp.execute("query-migrate")).get("status") not in OVER:  # noqa: ASYNC110 (it has no event)
            await trio.sleep(_POLL_S)


async def _set_capabilities(qmp: QmpClient, *names: str, on: bool) -> None:
    await qmp.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": name, "state": on} for name in names]}
    )


async def _hand_over(qmp: QmpClient) -> trio.socket.SocketType:
    """A socket whose other end QEMU has under the name `_FD_NAME`."""
    ours, theirs = trio.socket.socketpair()
    try:
        await qmp.execute("getfd", {"fdname": _FD_NAME}, descriptors=(theirs.fileno(),))
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours


async def _receive_all(link: trio.socket.SocketType) -> bytes:
    stream = bytearray()
    try:
        while data := await link.recv(_RECEIVE_BYTES):
            stream += data
            if len(stream) > MAX_STREAM_BYTES:
                raise GuestError(
                    f"QEMU's device state is above {MAX_STREAM_BYTES >> 20} MiB: some memory is in no shared backend"
                )
    except OSError as error:
        raise GuestError(f"QEMU's device state ended early: {error.strerror}") from error
    return bytes(stream)


async def _wait_completed(qmp: QmpClient) -> None:
    while True:
        info = record(await qmp.execute("query-migrate"))
        match info.get("status"):
            case "completed":
                return
            case "failed" | "cancelled":
                raise GuestError(
                    f"QEMU's own migration failed: {info.get('error-desc', 'its output says why')}"
                )
        await trio.sleep(_POLL_S)
