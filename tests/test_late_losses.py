"""What a destination does of a connection that is lost late, of a token that is early, and of what its peer says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.engine.channel import SourceChannel
from pagexfer.engine.control import Control
from pagexfer.errors import Outcome, TransferAborted
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.testing.proxy import Action, FaultProxy, at_bundle
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.control import ChannelsOpen, ControlMessage, Failed

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagexfer.testing.proxy import Frame

_STALL_S = 30.0
_PATIENCE_S = 20.0  # less than that

End = MigrationReport | TransferAborted


async def _migrate(
    machine: SmallMachine, point: Callable[[Frame], bool], cut: int | None, channels: int = 2
) -> tuple[End, End]:
    """Both ends of a migration; connection `cut` is lost when `point` comes by."""
    ends: dict[str, End] = {}

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        try:
            ends["received"] = await receive_guest(
                machine.destination,
                HOST,
                0,
                ATTESTOR,
                stall_timeout_s=_STALL_S,
                on_listening=task_status.started,
            )
        except TransferAborted as aborted:
            ends["received"] = aborted

    with trio.fail_after(_PATIENCE_S):
        async with trio.open_nursery() as network:
            async with trio.open_nursery() as sides:
                proxy = FaultProxy(
                    HOST, await sides.start(receive), point, Action.PASS, lambda: proxy.cut(cut)
                )
                port = await network.start(proxy.serve)
                try:
                    ends["sent"] = await send_guest(machine.source, HOST, port, ATTESTOR, channels=channels)
                except TransferAborted as aborted:
                    ends["sent"] = aborted
            network.cancel_scope.cancel()
    return ends["sent"], ends["received"]


@pytest.mark.parametrize("kind", [BundleKind.DEVICE_STATE, BundleKind.VCPU_STATE, BundleKind.MANIFEST])
async def test_only_channel_0_is_needed_once_states_are_sent(kind: BundleKind) -> None:
    machine = SmallMachine()
    for end in await _migrate(machine, at_bundle(kind), 1):
        assert isinstance(end, MigrationReport), end
    assert machine.moved()


async def test_a_token_before_the_barriers_breaks_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_channel: SourceChannel, _epoch: int) -> None:
        return

    monkeypatch.setattr(SourceChannel, "barrier", nothing)
    machine = SmallMachine()
    # Over one channel all bundles are there before the token; over two the SVSM may miss some first.
    for end in await _migrate(machine, lambda _frame: False, None, channels=1):
        assert isinstance(end, TransferAborted)
        assert (end.outcome, end.reason) == (Outcome.ENDED, "protocol")
        assert "before every channel's BARRIER" in str(end)
    assert machine.stayed()


async def test_another_number_of_channels_than_there_are_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Control.send

    async def one_more(control: Control, message: ControlMessage) -> None:
        await send(
            control, ChannelsOpen(message.channels + 1) if isinstance(message, ChannelsOpen) else message
        )

    monkeypatch.setattr(Control, "send", one_more)
    machine = SmallMachine()
    sent, received = await _migrate(machine, lambda _frame: False, None)
    assert "has 3 of 2 channels open" in str(sent)
    assert str(received).startswith("the source says: ")
    assert machine.stayed()


async def test_what_the_peer_says_is_shown_as_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides nothing, whoever wrote it, and is not said back."""
    said: list[Failed] = []
    send = Control.send

    async def boast(control: Control, message: ControlMessage) -> None:
        if isinstance(message, ChannelsOpen):
            message = Failed("undecided", "the guest runs here")
        if isinstance(message, Failed):
            said.append(message)
        await send(control, message)

    monkeypatch.setattr(Control, "send", boast)
    machine = SmallMachine()
    sent, _ = await _migrate(machine, lambda _frame: False, None)
    assert isinstance(sent, TransferAborted)
    assert (sent.outcome, str(sent)) == (Outcome.ENDED, "the destination says: the guest runs here")
    assert sum(message.message.endswith("the guest runs here") for message in said) == 1
    assert machine.stayed()
