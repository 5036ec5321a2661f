"""Handshake messages harmed on the network between two engines: the guest stays where it is, and both sides say why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from pagexfer.errors import Outcome, TransferAborted
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.testing.proxy import Action, FaultProxy, at_frame
from pagexfer.wire.framing import FrameType

from .engine_guests import SmallMachine
from .handshakes import KINDS, attestors
from .loopback import HOST

if TYPE_CHECKING:
    from pagexfer.attestation import Attestor

# The first control frames of a migration, in this order.
_MESSAGES: Final = ("prepare", "accept", "confirm", "established")
# Long, but for the message that never comes.
_TIMEOUT_S: Final = {Action.DROP: 0.5}
_PATIENCE_S: Final = 20.0

End = MigrationReport | TransferAborted | None


class _Migration:
    """A small guest, a proxy that harms one frame, and how both sides ended; None for a side that still waited."""

    def __init__(self, near: Attestor, far: Attestor) -> None:
        self.machine = SmallMachine()
        self.sent: End = None
        self.received: End = None
        self._attestors = near, far

    async def run(self, number: int, action: Action) -> None:
        near, far = self._attestors
        self._timeout_s = _TIMEOUT_S.get(action, _PATIENCE_S / 2)
        with trio.fail_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                port = await nursery.start(self._receive, far)
                proxy = FaultProxy(HOST, port, at_frame(FrameType.CONTROL, number), action)
                proxy_port = await nursery.start(proxy.serve)
                try:
                    self.sent = await send_guest(
                        self.machine.source,
                        HOST,
                        proxy_port,
                        near,
                        channels=2,
                        stall_timeout_s=self._timeout_s,
                    )
                except TransferAborted as aborted:
                    self.sent = aborted
                assert proxy.reached.is_set()
                if number == len(_MESSAGES):  # a destination that has keys ends with its source
                    while self.received is None:  # noqa: ASYNC110 (a side has no event)
                        await trio.sleep(0.001)
                nursery.cancel_scope.cancel()

    async def _receive(
        self, attestor: Attestor, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            self.received = await receive_guest(
                self.machine.destination,
                HOST,
                0,
                attestor,
                stall_timeout_s=self._timeout_s,
                on_listening=task_status.started,
            )
        except TransferAborted as aborted:
            self.received = aborted


async def test_without_harm_the_guest_moves_with_every_kind() -> None:
    for kind in KINDS:
        migration = _Migration(*attestors(kind))
        await migration.run(4, Action.PASS)
        assert migration.machine.moved()
        for end in (migration.sent, migration.received):
            assert isinstance(end, MigrationReport)
            assert end.peer.kind.label == kind


@pytest.mark.parametrize(
    "action", [Action.FLIP, Action.DROP, Action.DUPLICATE, Action.TRUNCATE, Action.CUT], ids=lambda a: a.value
)
@pytest.mark.parametrize("message", _MESSAGES)
async def test_a_harmed_message_leaves_the_guest_at_the_source(message: str, action: Action) -> None:
    migration = _Migration(*attestors("psk"))
    await migration.run(_MESSAGES.index(message) + 1, action)
    assert migration.machine.stayed()
    assert isinstance(migration.sent, TransferAborted)
    if action is Action.FLIP and message != "prepare":  # which may no longer be a hello at all
        assert (migration.sent.outcome, migration.sent.reason) == (Outcome.REFUSED, "authentication")
        assert "prove who it is" in str(migration.sent)
    elif action is not Action.FLIP:
        assert migration.sent.outcome is Outcome.ENDED
    if message != "established":
        assert migration.received is None or isinstance(migration.received, TransferAborted)
        return
    assert isinstance(migration.received, TransferAborted)
    assert migration.received.outcome is migration.sent.outcome


@pytest.mark.parametrize(("near", "far"), [("psk", "emulated"), ("emulated", "psk"), ("snp", "emulated")])
async def test_sides_of_different_kinds_refuse_each_other(near: str, far: str) -> None:
    migration = _Migration(attestors(near)[0], attestors(far)[1])
    await migration.run(1, Action.PASS)
    assert isinstance(migration.sent, TransferAborted)
    assert (migration.sent.outcome, migration.sent.reason) == (Outcome.REFUSED, "authentication")
    assert "same kind of attestation" in str(migration.sent)
    assert migration.machine.stayed()
    assert migration.received is None  # it still waits for another source
