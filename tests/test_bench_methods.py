"""How the benches compare: what is decided before anything is timed, and what is said of what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import channels, limits, scale
from bench.__main__ import main
from bench.measure import Case, Spread, alternate, rotated
from bench.pair import Side
from bench.sealed import Move, Moved

if TYPE_CHECKING:
    from bench.tcp import Plain

MOVED = Moved(Side(1.0, 1.0, 1.0), True, 1.0, 0.05, 3, 1, 10_000_000, 100.0)


def bad_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a bench that refuses its options, before anything is measured."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_each_case_is_first_equally_often() -> None:
    assert [rotated("abc", round_)[0] for round_ in range(6)] == list("abcabc")
    assert sorted(rotated("abc", 2)) == list("abc")
    assert rotated([], 1) == []


def test_alternating_cases_take_turns_to_be_first() -> None:
    ran: list[str] = []
    alternate({name: Case(lambda name=name: ran.append(name)) for name in "ab"}, 2)  # type: ignore[misc]
    assert "".join(ran) == "abbaab"


def test_the_longest_time_is_the_lowest_rate() -> None:
    assert Spread(2.0, 1.0, 4.0).rate(8.0) == Spread(4.0, 2.0, 8.0)


def test_opening_opens_all_of_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    class Cipher:
        def __init__(self, key: bytes) -> None:
            self.encrypt = AESGCM(key).encrypt

        def decrypt_into(self, nonce: bytes, data: bytes, associated: None, out: memoryview) -> None:
            opened.append(data)

    monkeypatch.setattr(limits, "AESGCM", Cipher)
    # Two records and a page of a third one.
    words = np.random.default_rng(1).integers(1, 2**63, (2 * 256 + 1, 512), dtype=np.uint64)
    limits._open(words)()
    assert [len(record) for record in opened] == [(1 << 20) + 16, (1 << 20) + 16, 4096 + 16]
    assert len(set(opened)) == 3


@pytest.mark.parametrize(
    ("cpus", "number", "local", "isolated"),
    [
        (2, 1, "threads", "threads"),
        (2, 4, "loop + threads", "threads"),
        (2, 16, "loop", "loop"),
        (8, 16, "threads", "threads"),
        (8, 64, "loop", "loop"),
    ],
)
def test_a_row_names_what_carries_its_channels(
    cpus: int, number: int, local: str, isolated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(cpus)))
    assert channels.carriers(Move(1 << 20, number)) == local
    assert channels.carriers(Move(1 << 20, number, isolated=True)) == isolated


def test_what_carries_channels_has_the_default_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 1})
    moves = channels.by_carrier(Move(1 << 20, 4, channel_threads=True))
    assert list(moves) == [
        "local, loop + threads (default)",
        "local, loop",
        "local, threads",
        "isolated, threads (default)",
        "isolated, loop",
    ]
    assert moves["local, loop + threads (default)"].channel_threads is None


def test_a_row_names_the_pages_of_its_bundles() -> None:
    found = [channels.bundle_pages(Move(1 << 20, number)) for number in (1, 16, 17)]
    assert found == [480, 480, 256]
    assert channels.bundle_pages(Move(1 << 20, 4, bundle_pages=512)) == 480


def test_plain_tcp_and_each_engine_take_turns_to_be_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def plain(job: Plain) -> tuple[Side, Side]:
        ran.append("plain")
        return MOVED.side, MOVED.side

    def move(move: Move) -> tuple[Moved, Side]:
        ran.append("isolated" if move.isolated else "local")
        return MOVED, MOVED.side

    monkeypatch.setattr(channels, "run_plain", plain)
    monkeypatch.setattr(channels, "run_move", move)
    channels.measure({"4": channels.engines(Move(1 << 20, 4))}, 3)
    assert ran == ["plain", "local", "isolated", "local", "isolated", "plain", "isolated", "plain", "local"]


def test_many_channels_are_held_against_few_of_the_same_round_for_each_engine() -> None:
    def figure(local: tuple[float, ...], isolated: tuple[float, ...]) -> channels.Figure:
        one = Spread.of([1.0])
        ran = channels.Ran("loop", 480, one, one, one, (one, one), (), one, (one, one))
        engines = {"local": local, "isolated": isolated}
        return channels.Figure(
            one,
            one,
            (one, one),
            one,
            {name: replace(ran, rounds_cpu_s_per_gib=cpu) for name, cpu in engines.items()},
        )

    few, many = figure((1.0, 2.0), (1.0, 1.0)), figure((1.1, 2.6), (2.0, 2.0))
    note = channels.channels_note({"4": few, "64": many})
    assert "local +20% (+10% to +30%) and isolated +100% (+100% to +100%)" in note
    assert "local engines have 1.00 of TCP with 1.50 CPU s/GiB" in note


def test_from_a_line_that_misses_a_size_nothing_is_projected() -> None:
    good, bad = scale.Line(0.1, 0.6, 0.02), scale.Line(10.0, 0.3, 0.4)
    spread = Spread.of([1.0])
    figures = [scale.Figure(size << 30, spread, spread, spread, spread, spread, 1.0) for size in (1, 2)]
    rows = scale.projection_table(scale.Lines(good, good, good, bad), figures, 1).rows
    assert {row[0]: row[1:] for row in rows}["downtime ms"] == ("no line", "+40%")
    assert rows[0] == ("seconds, as measured here", "614", "+2%")
    assert (
        "From 2 sizes up to 2 GiB, 1 round"
        in scale.projection_table(scale.Lines(good, good, good, bad), figures, 1).note
    )
