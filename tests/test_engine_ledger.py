"""The ledger between two engines: it arrives with one record more, and whoever refuses it leaves the guest be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from pagexfer.attestation import PskAttestor
from pagexfer.errors import Outcome, PolicyRefused, TransferAborted, UsageError
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.wire.ledger import parse_ledger_untrusted

from .engine_guests import DestinationGuest, SmallMachine
from .journeys import Limited
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from pagexfer.attestation import Attestor
    from pagexfer.guests.guest import Guest

PSK = b"a pre-shared key of 32 bytes ..."


async def move(
    source: Guest, destination: Guest, ledger: bytes, near: Attestor = ATTESTOR, far: Attestor = ATTESTOR
) -> tuple[MigrationReport | TransferAborted, MigrationReport | TransferAborted]:
    """How both sides ended."""
    received: list[MigrationReport | TransferAborted] = []

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        try:
            received.append(await receive_guest(destination, HOST, 0, far, on_listening=task_status.started))
        except TransferAborted as aborted:
            received.append(aborted)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(receive)
            sent: MigrationReport | TransferAborted
            try:
                sent = await send_guest(source, HOST, port, near, ledger=ledger, channels=2)
            except TransferAborted as aborted:
                sent = aborted
    return sent, received[0]


async def test_a_guest_that_moves_on_takes_its_ledger_along() -> None:
    machine = SmallMachine()
    sent, received = await move(machine.source, machine.destination, b"")
    assert isinstance(sent, MigrationReport)
    assert isinstance(received, MigrationReport)
    assert machine.moved()
    assert sent.ledger == b""
    assert len(parse_ledger_untrusted(received.ledger)) == 1
    onward = DestinationGuest()
    sent, again = await move(machine.destination, onward, received.ledger)
    assert isinstance(sent, MigrationReport)
    assert isinstance(again, MigrationReport)
    assert onward.gate.running
    assert again.ledger.startswith(received.ledger)
    assert len(parse_ledger_untrusted(again.ledger)) == 2


async def test_a_destination_whose_policy_allows_no_more_moves_refuses_while_the_guest_runs() -> None:
    first = SmallMachine()
    ledger = b""
    source: Guest = first.source
    destination = first.destination
    for _ in range(2):
        _, received = await move(source, destination, ledger)
        assert isinstance(received, MigrationReport)
        source, destination, ledger = destination, DestinationGuest(), received.ledger
    calls = list(source.hypervisor.calls)  # type: ignore[attr-defined]  # a TestHypervisor's
    sent, refused = await move(source, destination, ledger, far=Limited(PSK))
    for end in (sent, refused):
        assert isinstance(end, TransferAborted)
        assert (end.outcome, end.reason) == (Outcome.REFUSED, "policy")
    assert source.gate.parked() == 0
    assert not destination.gate.running
    assert "stop" not in source.hypervisor.calls[len(calls) :]  # type: ignore[attr-defined]


async def test_a_source_that_may_not_move_again_says_so_itself() -> None:
    machine = SmallMachine()

    class Never(PskAttestor):
        def check_move(self, move: int) -> None:
            raise PolicyRefused("no more moves")

    end: TransferAborted | None = None
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(_listen_only, machine.destination)
            try:
                await send_guest(machine.source, HOST, port, Never(PSK))
            except TransferAborted as aborted:
                end = aborted
            nursery.cancel_scope.cancel()
    assert end is not None
    assert (end.outcome, end.reason) == (Outcome.REFUSED, "policy")
    assert machine.source.gate.running


async def _listen_only(guest: Guest, task_status: trio.TaskStatus[int]) -> None:
    await receive_guest(guest, HOST, 0, ATTESTOR, on_listening=task_status.started)


async def test_a_file_that_is_no_ledger_is_the_callers_mistake() -> None:
    for ledger in (b"no ledger, but enough bytes", b"PGXLEDGR"):
        with pytest.raises(UsageError, match="not the ledger of a guest"):
            await send_guest(SmallMachine().source, HOST, 9, ATTESTOR, ledger=ledger)
