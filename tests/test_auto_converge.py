"""Guests that write faster than a capped link: throttling and a longer black-out make them converge, nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

import pagexfer
from pagexfer import MigrationParameters, Steering
from pagexfer.engine.convergence import THROTTLE_INITIAL
from pagexfer.guests.checked import prove, start
from pagexfer.guests.simulated import SimulatedGuest

if TYPE_CHECKING:
    from pagexfer.guests.checked import CheckedGuest
    from pagexfer.guests.kvm import KvmGuest

PSK = pagexfer.PskAttestor(bytes(range(32)))
RAM = 16 << 20
LINK = 64 << 20
RATE = 130 << 20
# A guest that gets no processor for a moment on a busy machine writes nothing. So little fits under this limit that it
# would have to stand still for most of an epoch.
TIGHT = MigrationParameters(downtime_limit_s=0.03, max_bandwidth_bytes=LINK)


async def _migrate(
    source: CheckedGuest,
    destination: CheckedGuest,
    steering: Steering,
    infos: list[pagexfer.MigrationInfo] | None = None,
    *,
    isolated: bool = False,
) -> pagexfer.MigrationReport | pagexfer.TransferAborted:
    async def serve(task_status: trio.TaskStatus[int]) -> None:
        try:
            await pagexfer.receive_guest(destination, "127.0.0.1", 0, PSK, on_listening=task_status.started)
        except pagexfer.TransferAborted as aborted:
            ends.append(aborted)

    ends: list[pagexfer.TransferAborted] = []
    await start(source)
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(serve)
        try:
            return await pagexfer.send_guest(
                source,
                "127.0.0.1",
                port,
                PSK,
                channels=2,
                steering=steering,
                isolated=isolated,
                on_progress=lambda info: infos.append(info) if infos is not None else None,
            )
        except pagexfer.TransferAborted as aborted:
            return aborted


async def test_a_guest_that_outruns_the_link_does_not_converge_by_itself() -> None:
    with (
        SimulatedGuest.boot(RAM, 2, write_rate_bytes=1 << 50) as source,
        SimulatedGuest.empty(RAM, 2) as destination,
    ):
        with trio.fail_after(30):
            end = await _migrate(source, destination, Steering(TIGHT))
        assert isinstance(end, pagexfer.TransferAborted)
        assert end.reason == "not-converging"
        assert (await prove(source, 0.05)).consistent


async def test_auto_converge_slows_it_down_until_it_does(
    guest_type: type[KvmGuest] | type[SimulatedGuest],
) -> None:
    await _converges(guest_type, isolated=False)


async def test_auto_converge_of_an_isolated_engine() -> None:
    await _converges(SimulatedGuest, isolated=True)


async def _converges(guest_type: type[KvmGuest] | type[SimulatedGuest], *, isolated: bool) -> None:
    infos: list[pagexfer.MigrationInfo] = []
    with (
        guest_type.boot(RAM, 2, write_rate_bytes=RATE) as source,
        guest_type.empty(RAM, 2) as destination,
    ):
        with trio.fail_after(30):
            steering = Steering(replace(TIGHT, auto_converge=True))
            end = await _migrate(source, destination, steering, infos, isolated=isolated)
        assert isinstance(end, pagexfer.MigrationReport), end
        # At the destination nothing is held back, and nothing of the throttle is in the guest.
        proof = await prove(destination, 0.1)
        assert (proof.consistent, proof.progressed) == (True, True), proof.faults
    throttle = end.info.throttle
    assert throttle is not None
    assert throttle.percentage == 0
    most = max(info.throttle.percentage for info in infos if info.throttle is not None)
    assert most >= THROTTLE_INITIAL
    assert 0 < throttle.slowdown < most
    described = end.info.as_dict()
    assert described["cpu-throttle-percentage"] == 0
    assert described["guest-slowdown-percentage"] == round(throttle.slowdown, 1)


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [
        # It converges at once, but in a pause it writes more than an epoch sends.
        (MigrationParameters(downtime_limit_s=1.0, auto_converge=True), 40 << 20),
        # It converges only when it is slowed down.
        (replace(TIGHT, auto_converge=True), RATE),
    ],
    ids=["slow", "fast"],
)
async def test_a_guest_is_not_slowed_down_while_the_operator_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, parameters: MigrationParameters, rate: int
) -> None:
    monkeypatch.setattr("pagexfer.engine.course.PAUSE_EPOCH_S", 0.05)
    steering = Steering(replace(parameters, pause_before_switchover=True))
    paused: list[pagexfer.MigrationInfo] = []
    infos: list[pagexfer.MigrationInfo] = []

    async def wait_some_epochs() -> None:
        with trio.fail_after(30):
            while len(paused) < 2 or paused[-1].ram.dirty_sync_count < paused[0].ram.dirty_sync_count + 8:
                await trio.sleep(0.001)
                if infos and infos[-1].status is pagexfer.Status.PRE_SWITCHOVER:
                    paused.append(infos[-1])
                    assert steering.paused  # for as long as it takes
        steering.continue_switchover()

    with (
        SimulatedGuest.boot(RAM, 2, write_rate_bytes=rate) as source,
        SimulatedGuest.empty(RAM, 2) as destination,
    ):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_some_epochs)
                end = await _migrate(source, destination, steering, infos)
        assert isinstance(end, pagexfer.MigrationReport), end
    assert {info.throttle.percentage for info in paused if info.throttle is not None} <= {0}
    first = infos.index(paused[0])
    before = max((info.throttle.percentage for info in infos[:first] if info.throttle is not None), default=0)
    assert (before >= THROTTLE_INITIAL) is (rate == RATE)


async def test_a_migration_that_ends_lets_the_guest_run_at_full_speed() -> None:
    steering = Steering(replace(TIGHT, downtime_limit_s=0.015, auto_converge=True))
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=1 << 50) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):
        throttled: list[int] = []

        async def cancel_once_throttled() -> None:
            with trio.fail_after(20):
                while source.hypervisor.throttle_percentage == 0:  # noqa: ASYNC110 (the guest has no event)
                    await trio.sleep(0.001)
            throttled.append(source.hypervisor.throttle_percentage)
            steering.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_once_throttled)
            end = await _migrate(source, destination, steering)
        assert isinstance(end, pagexfer.TransferAborted)
        assert end.reason == "cancelled"
        assert throttled[0] >= THROTTLE_INITIAL
        assert source.hypervisor.throttle_percentage == 0
        assert (await prove(source, 0.05)).progressed


async def test_a_longer_black_out_is_taken_where_the_operator_allows_it() -> None:
    with (
        SimulatedGuest.boot(RAM, 2, write_rate_bytes=1 << 50) as source,
        SimulatedGuest.empty(RAM, 2) as destination,
    ):
        with trio.fail_after(30):
            end = await _migrate(source, destination, Steering(replace(TIGHT, max_downtime_limit_s=2.0)))
        assert isinstance(end, pagexfer.MigrationReport), end
    limit = end.info.downtime_limit
    assert limit is not None
    assert 30 < limit <= 2000
    assert end.info.expected_downtime is not None
    assert 30 < end.info.expected_downtime <= limit


@pytest.mark.parametrize("change", ["limit", "bandwidth"])
async def test_limits_changed_while_it_runs_let_it_complete(change: str) -> None:
    # With the first limits this would not end: what the guest writes never fits.
    steering = Steering(replace(TIGHT, max_downtime_limit_s=None, timeout_s=25.0))
    infos: list[pagexfer.MigrationInfo] = []
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=40 << 20) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):
        steering.parameters = replace(steering.parameters, max_bandwidth_bytes=16 << 20)

        async def change_in_the_second_epoch() -> None:
            with trio.fail_after(20):
                while not infos or infos[-1].ram.dirty_sync_count < 2:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            changed = {"downtime_limit_s": 10.0} if change == "limit" else {"max_bandwidth_bytes": None}
            steering.parameters = replace(steering.parameters, **changed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change_in_the_second_epoch)
            end = await _migrate(source, destination, steering, infos)
        assert isinstance(end, pagexfer.MigrationReport), end


async def test_a_migration_stays_under_its_bandwidth_limit() -> None:
    infos: list[pagexfer.MigrationInfo] = []
    limit = 16 << 20
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=0, free=0) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):
        end = await _migrate(
            source, destination, Steering(MigrationParameters(max_bandwidth_bytes=limit)), infos
        )
        assert isinstance(end, pagexfer.MigrationReport), end
    moving_s = (end.info.total_time - end.info.setup_time) / 1000
    # Beside the limit: ten unpaced segments of each of two channels.
    assert end.info.ram.transferred / moving_s <= 1.5 * limit


@pytest.mark.parametrize("end_by", ["continue", "cancel"])
async def test_an_isolated_engine_is_steered_as_well(end_by: str) -> None:
    steering = Steering(MigrationParameters(pause_before_switchover=True))
    infos: list[pagexfer.MigrationInfo] = []
    with (
        SimulatedGuest.boot(RAM, 1, write_rate_bytes=1 << 20) as source,
        SimulatedGuest.empty(RAM, 1) as destination,
    ):

        async def answer_the_pause() -> None:
            with trio.fail_after(20):
                while not steering.paused:  # noqa: ASYNC110 (an embedding program looks at progress)
                    await trio.sleep(0.005)
            steering.parameters = replace(steering.parameters, downtime_limit_s=1.25)
            steering.cancel() if end_by == "cancel" else steering.continue_switchover()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_the_pause)
            end = await _migrate(source, destination, steering, infos, isolated=True)
        assert not steering.paused
        if end_by == "cancel":
            assert isinstance(end, pagexfer.TransferAborted)
            assert (end.outcome, end.reason) == (pagexfer.Outcome.ENDED, "cancelled")
            assert infos[-1].status is pagexfer.Status.CANCELLED
            assert (await prove(source, 0.05)).progressed
        else:
            assert isinstance(end, pagexfer.MigrationReport), end
            assert end.info.downtime_limit == 1250
            assert (await prove(destination, 0.05)).consistent
