"""The security contract, rule by rule: each test breaks one rule on purpose and sees the documented refusal.

The attacker is the host: it holds every bundle, may change it, and may give the SVSMs any command. What it cannot do is
make a bundle itself; where a rule guards against a source that is authentic but wrong, the test seals with the source's
own sealers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from pagexfer.errors import (
    IntegrityError,
    KeyExhausted,
    LocalProtocolError,
    MalformedData,
    NotReady,
    ReplayError,
)
from pagexfer.wire.bundle import HEADER_BYTES, BundleKind
from pagexfer.wire.constants import FINAL_EPOCH, MAX_BUNDLES_PER_KEY, PAGE_SIZE
from pagexfer.wire.slot import SessionStatus as State
from pagexfer.wire.token import EpochTotals

from .rule_breaking import (
    one_page,
    open_pair,
    pages,
    refused,
    sealed_by_source,
)
from .small_guests import PAGES, VCPUS, Move, a_move

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.testing import Message, SvsmPair


@pytest.fixture
def move() -> Iterator[Move]:
    yield from a_move()


# R1: a page at most once an epoch


def test_r1_second_bundle_with_a_page_of_this_epoch_is_refused(move: Move) -> None:
    pair = open_pair(move)
    pair.send(sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(7)))
    again = sealed_by_source(pair, BundleKind.PAGES, b"\1" * PAGE_SIZE, entries=one_page(7), channel=1)
    refused(move, again, ReplayError)


def test_r1_the_same_page_in_the_next_epoch_is_fine(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    move.guest.write(7, 1234)
    pair.epoch()
    assert int(move.memory.words[7, 0]) == 1234


def test_r1_page_twice_in_one_bundle_is_refused(move: Move) -> None:
    pair = open_pair(move)
    twice = sealed_by_source(pair, BundleKind.PAGES, bytes(2 * PAGE_SIZE), entries=one_page(7) * 2)
    refused(move, twice, MalformedData)


def test_r1_source_takes_no_new_pages_into_an_epoch_under_way(move: Move) -> None:
    pair = open_pair(move)
    pages(pair)
    move.guest.write(0, 99)
    with pytest.raises(LocalProtocolError):
        pair.source.begin_epoch()
    while pair.seal_pages(0, 0, PAGES):
        pass
    gfns = [
        int(word) & (1 << 40) - 1
        for message in pair.sent
        for word in np.frombuffer(message.data[HEADER_BYTES : message.header.aad_bytes], dtype="<u8")
    ]
    assert sorted(gfns) == list(range(PAGES))


# R2: the current epoch, the next counter


@pytest.mark.parametrize("epoch", [2, FINAL_EPOCH])
def test_r2_bundle_of_another_epoch_is_refused(move: Move, epoch: int) -> None:
    pair = open_pair(move)
    refused(
        move,
        sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(0), epoch=epoch),
        ReplayError,
    )


def test_r2_bundle_of_an_older_epoch_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    old = sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(0), epoch=1)
    refused(move, old, ReplayError)


def test_r2_replayed_bundle_is_refused(move: Move) -> None:
    pair = open_pair(move)
    message = pages(pair)
    pair.send(message)
    refused(move, message, ReplayError)


def test_r2_replay_of_a_bundle_of_a_closed_epoch_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    old = next(message for message in pair.sent if message.header.kind is BundleKind.PAGES)
    move.guest.write(0, 5)
    pair.epoch()
    refused(move, old, ReplayError)


def test_r2_gap_in_the_counter_is_refused(move: Move) -> None:
    pair = open_pair(move)
    pages(pair)
    refused(move, pages(pair), ReplayError)


# R3: the epoch token counts all channels


def epoch_but(move: Move, leave_out: int) -> Message:
    """All of an epoch delivered but for one channel's bundles; returns the token."""
    pair = open_pair(move)
    pair.send(pages(pair, 0))
    rest = pages(pair, 1)
    while pair.seal_pages(1, 0, PAGES):
        pass
    if leave_out != 1:
        pair.send(rest)
    return pair.seal_token(BundleKind.EPOCH_TOKEN)


def test_r3_token_is_refused_while_another_channels_bundle_is_missing(move: Move) -> None:
    refused(move, epoch_but(move, leave_out=1), IntegrityError)


def test_r3_complete_epoch_is_closed(move: Move) -> None:
    move.pair.send(epoch_but(move, leave_out=-1))
    assert move.pair.destination.state is State.IMPORTING
    assert np.array_equal(move.memory.words, move.guest.memory.words)


@pytest.mark.parametrize("totals", [EpochTotals(0, 1), EpochTotals(1, 0), EpochTotals(1, 1)])
def test_r3_wrong_counts_are_refused(move: Move, totals: EpochTotals) -> None:
    pair = open_pair(move)
    refused(move, sealed_by_source(pair, BundleKind.EPOCH_TOKEN, totals.pack()), IntegrityError)


def test_r3_token_over_another_channel_is_refused(move: Move) -> None:
    pair = open_pair(move)
    token = sealed_by_source(pair, BundleKind.EPOCH_TOKEN, EpochTotals(0, 0).pack(), channel=1)
    refused(move, token, IntegrityError)


def test_r3_pages_in_the_reserved_epoch_are_refused_even_once_verified(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    late = sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(0), epoch=FINAL_EPOCH)
    refused(move, late, IntegrityError)


# R4: completeness is the SVSM's


def test_r4_no_token_while_a_page_is_pending(move: Move) -> None:
    pair = open_pair(move)
    pair.send(pages(pair))
    with pytest.raises(NotReady):
        pair.seal_token(BundleKind.EPOCH_TOKEN)
    assert pair.source.state is State.PRECOPY
    pair.send(pages(pair))
    pair.send(pair.seal_token(BundleKind.EPOCH_TOKEN))


def test_r4_hint_adds_pages_and_takes_none_away(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    move.guest.write(3, 1)
    pair.source.hint(0, (1 << 9).to_bytes(8, "little"))
    assert pair.source.begin_epoch().gfns().tolist() == [3, 9]


def test_r4_host_cannot_export_what_is_not_pending(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    pair.source.begin_epoch()
    assert pair.seal_pages(0, 0, PAGES) is None


# R5: park first, and by the vCPUs' own flags


def test_r5_not_parked_while_one_vcpu_has_not_raised_its_flag(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    move.guest.gate.slow.add(1)
    steps: list[Callable[[], object]] = [
        lambda: pair.seal_vcpu(0),
        lambda: pair.seal_token(BundleKind.MANIFEST),
    ]
    for _ in range(3):
        assert pair.source.park() == (1, VCPUS)
        assert pair.source.state is State.PRECOPY
        for step in steps:
            with pytest.raises(LocalProtocolError):
                step()
    move.guest.gate.slow.clear()
    assert pair.source.park() == (VCPUS, VCPUS)
    assert pair.source.state is State.PARKED


def test_r5_nothing_of_the_black_out_without_park(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    for kind in (BundleKind.MANIFEST, BundleKind.START_TOKEN):
        with pytest.raises(LocalProtocolError):
            pair.seal_token(kind)
    with pytest.raises(LocalProtocolError):
        pair.seal_vcpu(0)


@pytest.mark.parametrize("kind", [BundleKind.MANIFEST, BundleKind.START_TOKEN])
def test_r5_nothing_is_handed_over_once_a_vcpu_runs_again(move: Move, kind: BundleKind) -> None:
    """Where the park is emulated, as with a stock QEMU, whoever has the hypervisor can undo it."""
    pair = move.pair
    pair.until_manifest()
    if kind is BundleKind.START_TOKEN:
        pair.manifest()
        pair.ready()
    move.guest.gate.slow.add(1)
    with pytest.raises(NotReady, match="runs again"):
        pair.seal_token(kind)
    assert pair.source.state is State.PARKED
    pair.source.abort()
    assert move.guest.gate.running


def test_r5_writes_before_the_park_cannot_be_skipped(move: Move) -> None:
    """The host skips the epoch after the park; the manifest looks at the tracker by itself."""
    pair = move.pair
    pair.until_precopy()
    move.guest.write(11, 4711)
    pair.park()
    pair.vcpus()
    with pytest.raises(NotReady):
        pair.seal_token(BundleKind.MANIFEST)
    pair.epoch()
    pair.manifest()
    pair.ready()
    pair.start()
    assert int(move.memory.words[11, 0]) == 4711
    assert move.arrived()


# R6: the start token, whole


@pytest.mark.parametrize("dirt", ["written", "state", "hint"])
def test_r6_no_manifest_while_something_is_dirty(move: Move, dirt: str) -> None:
    pair = move.pair
    pair.until_manifest()
    make_dirty(move, dirt)
    with pytest.raises(NotReady):
        pair.seal_token(BundleKind.MANIFEST)


@pytest.mark.parametrize("dirt", ["written", "state", "hint"])
def test_r6_no_start_token_for_what_changed_after_the_manifest(move: Move, dirt: str) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    pair.ready()
    make_dirty(move, dirt)
    with pytest.raises(NotReady):
        pair.start()
    assert pair.source.state is State.PARKED
    with pytest.raises(LocalProtocolError):
        pair.epoch()
    with pytest.raises(NotReady):
        pair.start()
    pair.source.abort()
    assert move.guest.gate.running


def make_dirty(move: Move, dirt: str) -> None:
    match dirt:
        case "written":
            move.guest.write(5, 1)
        case "state":
            move.guest.memory.rmpadjust(np.array([5]), 1, 0)
        case _:
            move.pair.source.hint(0, (1 << 5).to_bytes(8, "little"))


def test_r6_no_manifest_without_every_vcpu(move: Move) -> None:
    pair = move.pair
    pair.until_precopy()
    pair.park()
    pair.send(pair.seal_vcpu(0))
    with pytest.raises(NotReady):
        pair.manifest()


def test_r6_no_manifest_in_an_open_epoch(move: Move) -> None:
    pair = open_pair(move)
    pair.park()
    while message := pair.seal_pages(0, 0, PAGES):
        pair.send(message)
    pair.vcpus()
    with pytest.raises(NotReady):
        pair.manifest()


def test_r6_nothing_is_sealed_between_manifest_and_start_token(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    steps: list[Callable[[], object]] = [
        pair.source.begin_epoch,
        lambda: pair.seal_token(BundleKind.EPOCH_TOKEN),
        lambda: pair.seal_token(BundleKind.MANIFEST),
        lambda: pair.seal_pages(0, 0, PAGES),
        lambda: pair.seal_vcpu(0),
    ]
    for step in steps:
        with pytest.raises(LocalProtocolError):
            step()
    pair.ready()
    pair.start()
    assert pair.destination.state is State.RUNNING


def test_r7_no_point_of_no_return_where_no_token_can_be_sealed(move: Move) -> None:
    """A key that is used up is known of before START, not after it: the guest goes on here."""
    move.pair.until_manifest()
    move.pair.manifest()
    move.pair.ready()
    move.pair.source._sealer(0).counter = MAX_BUNDLES_PER_KEY
    with pytest.raises(KeyExhausted):
        move.pair.seal_token(BundleKind.START_TOKEN)
    assert move.pair.source.state is State.PARKED
    move.pair.source.abort()
    assert move.guest.gate.running


def test_r6_no_start_token_before_ready(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    with pytest.raises(NotReady):
        pair.start()
    assert pair.source.state is State.PARKED


def test_r6_destination_refuses_a_manifest_of_other_content(move: Move) -> None:
    """A dropped bundle of another channel shows in the manifest even where no epoch token counts it."""
    pair = move.pair
    pair.until_precopy()
    pair.park()
    pair.source.begin_epoch()
    for vcpu in range(VCPUS):
        pair.send(pair.seal_vcpu(vcpu))
    sealed_by_source(pair, BundleKind.CHANNEL_OPEN, b"", channel=1)  # a bundle that never arrives
    refused(move, pair.seal_token(BundleKind.MANIFEST), IntegrityError)


def test_r6_destination_refuses_a_manifest_without_a_vcpu(move: Move) -> None:
    """Even one that says of everything that came exactly what the destination says."""
    pair = move.pair
    pair.until_precopy()
    pair.send(sealed_by_source(pair, BundleKind.VCPU_STATE, b"\0\0\0\0state", epoch=2))
    refused(move, agreeing_manifest(pair, epoch=2), IntegrityError)


def test_r6_destination_refuses_a_manifest_before_every_page_came(move: Move) -> None:
    pair = open_pair(move)
    pair.send(sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(0)))
    pair.send(sealed_by_source(pair, BundleKind.EPOCH_TOKEN, EpochTotals(1, 1).pack()))
    for vcpu in range(VCPUS):
        state = vcpu.to_bytes(4, "little") + b"state"
        pair.send(sealed_by_source(pair, BundleKind.VCPU_STATE, state, epoch=2))
    refused(move, agreeing_manifest(pair, epoch=2), IntegrityError)


def test_r6_destination_refuses_a_manifest_in_an_open_epoch(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.send(sealed_by_source(pair, BundleKind.PAGES, bytes(PAGE_SIZE), entries=one_page(0), epoch=3))
    refused(move, agreeing_manifest(pair, epoch=3), IntegrityError)


def agreeing_manifest(pair: SvsmPair, epoch: int) -> Message:
    return sealed_by_source(pair, BundleKind.MANIFEST, pair.destination._own_manifest().pack(), epoch=epoch)


def test_r6_second_state_of_a_vcpu_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    second = sealed_by_source(pair, BundleKind.VCPU_STATE, b"\0\0\0\0other state", epoch=3)
    refused(move, second, ReplayError)


def test_r6_start_token_with_another_manifest_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    pair.manifest()
    other = bytearray(pair.source._manifest + bytes(64))
    other[20] ^= 1
    refused(
        move, sealed_by_source(pair, BundleKind.START_TOKEN, bytes(other), epoch=FINAL_EPOCH), IntegrityError
    )


def test_r6_start_token_without_a_manifest_is_refused(move: Move) -> None:
    pair = move.pair
    pair.until_manifest()
    refused(move, sealed_by_source(pair, BundleKind.START_TOKEN, b"", epoch=3), IntegrityError)
