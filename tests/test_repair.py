"""Connections of channels break while a busy guest is sent, and the guest arrives whole all the same (R9)."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from pagexfer.engine.destination import DestinationEngine
from pagexfer.errors import ChannelBroken, KeyExhausted, Outcome, TransferAborted
from pagexfer.migration import MigrationReport, receive_guest, send_guest
from pagexfer.svsm import sealing
from pagexfer.svsm.destination import DestinationSvsm
from pagexfer.svsm.sealing import Sealer
from pagexfer.testing.proxy import FaultProxy
from pagexfer.wire.bundle import BundleKind
from pagexfer.wire.framing import FrameType

from .engine_guests import SmallMachine
from .loopback import connections
from .machines import ATTESTOR, HOST, PATIENCE_S, Machines, Side, goes_on, is_parked, receive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagexfer.engine.streams import Connection
    from pagexfer.testing.proxy import Frame, _Link
    from pagexfer.wire.token import EpochTotals

_STALL_S: Final = 10.0


class Breaker(FaultProxy):
    """Ends the connection of a frame for which `breaks` is true, before it arrives or once it has."""

    def __init__(self, port: int, breaks: Callable[[Frame], bool], *, arrives: bool = False) -> None:
        super().__init__(HOST, port)
        self._breaks = breaks
        self._arrives = arrives
        self.broken: Counter[int | None] = Counter()

    async def _pass(self, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        if self._breaks(frame):
            self.broken[frame.channel] += 1
            if self._arrives:
                await super()._pass(link, frame, target)
                await self._taken()
            link.cut()
        else:
            await super()._pass(link, frame, target)

    async def _taken(self) -> None:
        """Until a frame that arrives has done so."""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


async def migrate(
    machines: Machines,
    breaks: Callable[[Frame], bool],
    *,
    isolated: bool = False,
    channel_threads: bool | None = None,
    arrives: bool = False,
) -> tuple[Side, Side, Breaker]:
    await machines.start()
    destination = Side()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as network, trio.open_nursery() as sides:
            port = await sides.start(
                receive, machines.destination, destination, _STALL_S, None, isolated, channel_threads
            )
            breaker = Breaker(port, breaks, arrives=arrives)
            broken = await network.start(breaker.serve)
            source = await machines.send(broken, _STALL_S, isolated=isolated, channel_threads=channel_threads)
            if not isinstance(source.end, MigrationReport):
                sides.cancel_scope.cancel()
            while destination.end is None and isinstance(source.end, MigrationReport):  # noqa: ASYNC110
                await trio.sleep(0.002)
            network.cancel_scope.cancel()
    return source, destination, breaker


def every(period: int, most: int, condition: Callable[[Frame], bool]) -> Callable[[Frame], bool]:
    """Every `period`th frame of those for which `condition` holds, at most `most` times."""
    seen = 0

    def breaks(frame: Frame) -> bool:
        nonlocal seen
        seen += condition(frame)
        return condition(frame) and seen % period == 0 and seen // period <= most

    return breaks


_BREAKS: Final[dict[str, Callable[[], Callable[[Frame], bool]]]] = {
    "pages of every channel": lambda: every(2, 6, lambda frame: frame.kind is BundleKind.PAGES),
    # The first one: with threads the other channels may leave it no second.
    "pages of channel 0": lambda: every(
        1, 3, lambda frame: frame.kind is BundleKind.PAGES and frame.channel == 0
    ),
    "barriers": lambda: every(2, 4, lambda frame: frame.type is FrameType.BARRIER),
    "tokens": lambda: every(1, 3, lambda frame: frame.kind is BundleKind.EPOCH_TOKEN),
    "new connections": lambda: every(
        1, 4, lambda frame: frame.kind is BundleKind.PAGES or frame.kind is BundleKind.CHANNEL_STATE
    ),
}


@pytest.mark.parametrize(
    ("name", "isolated", "channel_threads"),
    [
        *((name, False, threads) for name in _BREAKS for threads in (False, True)),
        ("pages of every channel", True, False),
        ("pages of every channel", True, True),
        ("barriers", True, True),
    ],
)
async def test_r9_guest_arrives_over_connections_that_break(
    machines: Machines, name: str, isolated: bool, channel_threads: bool
) -> None:
    source, destination, breaker = await migrate(
        machines, _BREAKS[name](), isolated=isolated, channel_threads=channel_threads
    )
    assert sum(breaker.broken.values()) >= 1
    assert isinstance(source.end, MigrationReport), source.end
    assert isinstance(destination.end, MigrationReport), destination.end
    for end in (source.end, destination.end):
        assert sum(channel.replaced for channel in end.info.channels) >= 1
    assert is_parked(machines.source)
    assert await goes_on(machines.destination)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("channel_threads", [False, True])
async def test_r9_a_token_that_arrived_counts_although_its_connection_broke(
    machines: Machines, isolated: bool, channel_threads: bool
) -> None:
    tokens = every(1, 2, lambda frame: frame.kind is BundleKind.EPOCH_TOKEN)
    source, destination, breaker = await migrate(
        machines, tokens, isolated=isolated, channel_threads=channel_threads, arrives=True
    )
    assert sum(breaker.broken.values()) >= 1
    assert isinstance(source.end, MigrationReport), source.end
    assert isinstance(destination.end, MigrationReport), destination.end
    assert await goes_on(machines.destination)


async def test_r9_a_token_that_is_being_imported_counts_although_its_connection_is_replaced(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new connection comes while a channel's thread is at the import."""
    close_epoch, replace = DestinationSvsm._close_epoch, DestinationEngine._replace
    importing, replacing = threading.Event(), threading.Event()

    def slow_close(svsm: DestinationSvsm, totals: EpochTotals) -> None:
        close_epoch(svsm, totals)
        importing.set()
        assert replacing.wait(PATIENCE_S)

    async def until_imported(_: Breaker) -> None:
        assert await trio.to_thread.run_sync(importing.wait, PATIENCE_S)

    async def seen_replace(
        engine: DestinationEngine, connection: Connection, channel: int, opening: bytes
    ) -> None:
        replacing.set()
        await replace(engine, connection, channel, opening)

    monkeypatch.setattr(DestinationSvsm, "_close_epoch", slow_close)
    monkeypatch.setattr(DestinationEngine, "_replace", seen_replace)
    monkeypatch.setattr(Breaker, "_taken", until_imported)
    token = every(1, 1, lambda frame: frame.kind is BundleKind.EPOCH_TOKEN)
    source, destination, breaker = await migrate(machines, token, channel_threads=True, arrives=True)
    assert sum(breaker.broken.values()) == 1
    assert isinstance(source.end, MigrationReport), source.end
    assert isinstance(destination.end, MigrationReport), destination.end
    assert await goes_on(machines.destination)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        # The bundle that opens a channel, channel 0's ledger, and hardly any pages.
        ("MAX_BUNDLES_PER_KEY", 3),
        # More than any chunk has of this guest; and all channels' first keys together carry less than all of it.
        ("MAX_BYTES_PER_KEY", 17 << 16),
    ],
)
async def test_r9_channel_whose_key_is_used_up_goes_on_under_another(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """For as long as pages are sent: the limit is the real one again once the first epoch is over."""
    real = getattr(sealing, limit)
    monkeypatch.setattr(sealing, limit, value)

    def at_token(frame: Frame) -> bool:
        if frame.kind is BundleKind.EPOCH_TOKEN:
            monkeypatch.setattr(sealing, limit, real)
        return False

    source, destination, _ = await migrate(machines, at_token)
    await arrived_with_new_keys(machines, source, destination)


async def test_r9_key_that_an_epoch_used_up_does_not_carry_its_token(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Sealer.seal
    refused: list[KeyExhausted] = []

    def seal_at_limit(self: Sealer, kind: BundleKind, *rest: Any) -> int:  # noqa: ANN401
        with monkeypatch.context() as limited:
            if kind is BundleKind.EPOCH_TOKEN and not refused:
                limited.setattr(sealing, "MAX_BUNDLES_PER_KEY", self.counter)
            try:
                return seal(self, kind, *rest)
            except KeyExhausted as error:
                refused.append(error)
                raise

    monkeypatch.setattr(Sealer, "seal", seal_at_limit)
    source, destination, _ = await migrate(machines, lambda _frame: False)
    assert len(refused) == 1
    await arrived_with_new_keys(machines, source, destination)


async def arrived_with_new_keys(machines: Machines, source: Side, destination: Side) -> None:
    """No connection broke, both sides counted the same replacements, and the guest arrived whole."""
    assert isinstance(source.end, MigrationReport), source.end
    assert isinstance(destination.end, MigrationReport), destination.end
    counts = [[channel.replaced for channel in end.info.channels] for end in (source.end, destination.end)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) >= 1
    assert is_parked(machines.source)
    assert await goes_on(machines.destination)


async def test_r9_channel_that_cannot_be_replaced_ends_the_migration(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagexfer.engine.repair.REPLACEMENT_TIMEOUT_S", 0.5)
    opened: Counter[int | None] = Counter()

    def no_second_connection(frame: Frame) -> bool:
        opened[frame.channel] += frame.kind is BundleKind.CHANNEL_OPEN
        again = frame.kind is BundleKind.CHANNEL_OPEN and opened[1] > 1
        return frame.channel == 1 and (again or frame.type is FrameType.BARRIER)

    source, _, _ = await migrate(machines, no_second_connection)
    end = source.end
    assert isinstance(end, TransferAborted)
    assert end.outcome is Outcome.ENDED
    assert end.reason == "connection"
    assert "channel 1" in str(end)
    assert await goes_on(machines.source)


class _TwoLosses(FaultProxy):
    """Resets all channels but channel 0 once each has sent its first BARRIER, and then the first new connection.

    That one breaks after the source has it, and before the source has all of the others.
    """

    def __init__(self, port: int, channels: int) -> None:
        super().__init__(HOST, port)
        self._channels = channels
        self._ended: list[_Link] = []
        self._renewed: list[_Link] = []
        self.barriers: Counter[tuple[_Link, bytes]] = Counter()

    async def _pass(self, link: _Link, frame: Frame, target: trio.SocketStream) -> None:
        if frame.type is FrameType.BARRIER:
            self.barriers[link, frame.data] += 1
            if frame.channel and len(self._ended) < self._channels - 1:
                self._ended.append(link)
                if len(self._ended) == self._channels - 1:
                    for each in self._ended:
                        _reset(each)
                return
        if frame.kind is BundleKind.CHANNEL_STATE:
            self._renewed.append(link)
            if len(self._renewed) == 2:
                _reset(self._renewed[0])
        await super()._pass(link, frame, target)


def _reset(link: _Link) -> None:
    """Cut so that whoever sends next fails at once."""
    for stream in (link.source, link.destination):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.cut()


async def test_r9_every_barrier_comes_over_a_new_connection_although_another_one_breaks() -> None:
    channels, machine = 6, SmallMachine()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as network, trio.open_nursery() as sides:

            async def receive_small(task_status: trio.TaskStatus[int]) -> None:
                await receive_guest(
                    machine.destination,
                    HOST,
                    0,
                    ATTESTOR,
                    stall_timeout_s=2,
                    channel_threads=False,
                    on_listening=task_status.started,
                )

            proxy = _TwoLosses(await sides.start(receive_small), channels)
            port = await network.start(proxy.serve)
            await send_guest(
                machine.source,
                HOST,
                port,
                ATTESTOR,
                channels=channels,
                channel_threads=False,
                stall_timeout_s=2,
            )
            network.cancel_scope.cancel()
    assert machine.moved()
    assert len(proxy._renewed) > channels
    assert set(proxy.barriers.values()) == {1}


async def test_end_of_a_connection_is_noticed_without_sending() -> None:
    async with connections() as (near, far):
        ended_before = near.ended
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.wait_end)
            far.close()
        assert (ended_before, near.ended) == (False, True)
        with pytest.raises(ChannelBroken):
            await near.receive_header()
