"""The in-memory pair itself: a whole move, and an interceptor that sees each message."""

from __future__ import annotations

from collections import Counter

import pytest

from pagexfer.errors import GateError, IntegrityError
from pagexfer.testing import BytesGate, Message
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.slot import SessionStatus as State

from .small_guests import Move


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_move_arrives(tracked: bool, channels: int) -> None:
    move = Move(channels=channels, tracked=tracked)
    move.pair.migrate()
    assert move.arrived()
    assert (move.pair.source.state, move.pair.destination.state) == (State.FINISHED, State.RUNNING)
    assert (move.guest.gate.running, move.gate.running) == (False, True)
    kinds = Counter(message.header.kind for message in move.pair.sent)
    assert kinds[BundleKind.CHANNEL_OPEN] == channels
    assert (kinds[BundleKind.EPOCH_TOKEN], kinds[BundleKind.VCPU_STATE]) == (2, 2)
    move.close()


def test_interceptor_sees_and_replaces_each_message() -> None:
    move = Move()
    seen: list[Message] = []

    def intercept(message: Message) -> list[Message]:
        seen.append(message)
        return [message.flipped(-1)] if message.header.kind is BundleKind.PAGES else [message]

    move.pair.intercept = intercept
    with pytest.raises(IntegrityError):
        move.pair.migrate()
    assert seen == move.pair.sent
    assert seen[-1].header.kind is BundleKind.PAGES
    move.close()


def test_bytes_gate_parks_when_the_last_vcpu_is_through() -> None:
    gate = BytesGate([b"a", b"b"], running=True)
    gate.slow.add(1)
    gate.raise_flag()
    assert (gate.parked(), gate.running) == (1, True)
    assert gate.save_state(0) == b"a"
    with pytest.raises(GateError):
        gate.save_state(1)
    gate.slow.clear()
    assert (gate.parked(), gate.running) == (2, False)
    gate.release()
    assert (gate.parked(), gate.running) == (0, True)


def test_bytes_gate_releases_nobody_without_a_state() -> None:
    gate = BytesGate.waiting(2)
    gate.load_state(0, b"a")
    with pytest.raises(GateError):
        gate.release()
    assert not gate.running
    gate.load_state(1, b"b")
    gate.release()
    assert gate.running
