"""How the benches compare: what is decided before anything is timed, and what is said of what was measured."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import pagexfer
from bench import (
    audit,
    channels,
    compression,
    convergence,
    limits,
    mailbox,
    profile,
    qemu,
    qemu_machine,
    scale,
    trackers,
)
from bench.__main__ import main
from bench.measure import Case, Spread, alternate, rotated
from bench.pair import Side
from bench.profile import Profile
from bench.qemu_machine import QemuFailed, resumption
from bench.qemu_moves import Taken
from bench.sealed import Move, Moved
from bench.stopwatch import Timed
from pagexfer.guests import kvm
from pagexfer.svsm.memory import GuestMemory

from .bench_usage import bad_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.tcp import Plain

MOVED = Moved(Side(1.0, 1.0, 1.0), True, 1.0, 0.05, 3, 1, 10_000_000, 100.0)


def test_each_case_is_first_equally_often() -> None:
    assert [rotated("abc", round_)[0] for round_ in range(6)] == list("abcabc")
    assert sorted(rotated("abc", 2)) == list("abc")
    assert rotated([], 1) == []


def test_alternating_cases_take_turns_to_be_first() -> None:
    ran: list[str] = []
    alternate({name: Case(lambda name=name: ran.append(name)) for name in "ab"}, 2)  # type: ignore[misc]
    assert "".join(ran) == "abbaab"


def test_the_longest_time_is_the_lowest_rate() -> None:
    rate = Spread.of([4.0, 1.0, 2.0]).rate(8.0)
    assert (rate.median, rate.minimum, rate.maximum) == (4.0, 2.0, 8.0)


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
        ran = channels.Ran("loop", 480, one, one, one, (one, one), one, one, (one, one))
        engines = {"local": local, "isolated": isolated}
        return channels.Figure(
            one,
            one,
            (one, one),
            one,
            {name: replace(ran, cpu_of_both=Spread.of(cpu)) for name, cpu in engines.items()},
        )

    few, many = figure((1.0, 2.0), (1.0, 1.0)), figure((1.1, 2.6), (2.0, 2.0))
    note = channels.channels_note({"4": few, "64": many})
    assert "local +20% (+10% to +30%) and isolated +100% (+100% to +100%)" in note
    assert "local engines have 1.00 of TCP with 1.50 CPU s/GiB" in note


def test_from_a_line_that_misses_a_size_nothing_is_projected() -> None:
    good, bad = scale.Line(0.1, 0.6, 0.02), scale.Line(10.0, 0.3, 0.4)
    spread = Spread.of([1.0])
    figures = [scale.Figure(size << 30, spread, spread, spread, spread, spread, 1.0) for size in (1, 2, 4)]
    rows = scale.projection_table(scale.Lines(good, good, good, bad), figures, 1).rows
    assert {row[0]: row[1:] for row in rows}["downtime ms"] == ("no line", "+40%")
    assert rows[0] == ("seconds, as measured here", "614", "+2%")
    assert (
        "From 3 sizes up to 4 GiB, 1 round"
        in scale.projection_table(scale.Lines(good, good, good, bad), figures, 1).note
    )


TAKEN = Taken(1.0, 0.1, 1.0, 1.0)


class Qemu(qemu_machine.Machine):
    """None is there: whoever stands for a way takes no time."""


@contextmanager
def no_machine(*arguments: object, **keywords: object) -> Iterator[Qemu]:
    yield Qemu(0, Path())


@contextmanager
def no_source(*arguments: object) -> Iterator[tuple[Path, qemu_machine.Shape, Qemu]]:
    yield Path(), qemu_machine.Shape(1 << 20, (), Path()), Qemu(0, Path())


def test_ways_from_one_qemu_to_another_take_turns_to_be_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def way(name: str) -> Callable[..., Taken]:
        def move(*_: object) -> Taken:
            ran.append(name)
            return TAKEN

        return move

    monkeypatch.setattr(qemu, "source_machine", no_source)
    monkeypatch.setattr(qemu, "destination_machine", no_machine)
    monkeypatch.setattr(qemu, "compare_ram", lambda *_: None)
    monkeypatch.setattr(qemu, "PREALLOCATED", (True,))
    monkeypatch.setattr(qemu, "WAYS", {name: way(name) for name in ("multifd TLS", "pagexfer")})
    qemu.measure("incompressible", 1 << 20, [1], 2, 1)
    assert ran == ["multifd TLS", "pagexfer", "pagexfer", "multifd TLS"]


def test_compression_has_the_same_threads_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def by_pagexfer(*_: object, **keywords: object) -> Taken:
        asked.append(keywords)
        return TAKEN

    monkeypatch.setattr(compression, "source_machine", no_source)
    monkeypatch.setattr(compression, "destination_machine", no_machine)
    monkeypatch.setattr(compression, "compare_ram", lambda *_: None)
    monkeypatch.setattr(compression, "by_multifd", lambda *_, **__: TAKEN)
    monkeypatch.setattr(compression, "by_pagexfer", by_pagexfer)
    compression.measure("zero", [100], 1 << 20, 3, 2, 1)
    assert {str(way["compression_level"]) for way in asked} == {"None", "3"}
    assert {way["channel_threads"] for way in asked} == {True}


def test_what_was_not_measured_stands_below_the_last_table() -> None:
    one = Spread.of([1.0])
    figure = qemu.Figure("incompressible", True, 1, "pagexfer", one, one, one, (one, one), one, one, one)
    other = replace(figure, prealloc=False)
    made = qemu.tables([figure, other], 1 << 20, {"booted": "no kernel"})
    assert [table.note for table in made[1:]] == ["Not measured: booted: no kernel."]
    assert "no kernel" not in made[0].note


def test_qemu_has_no_more_channels_than_multifd(capsys: pytest.CaptureFixture[str]) -> None:
    assert "256 channels" in bad_usage(["qemu", "--channels", "1,256"], capsys)


@pytest.mark.parametrize("bench", ["qemu", "compression"])
def test_without_memory_for_two_qemus_neither_bench_runs(
    bench: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zstandard", reason="compression needs the zstd extra")
    for module in (qemu, compression):
        monkeypatch.setattr(module, "need_qemu", lambda: None)
    monkeypatch.setattr(qemu_machine, "available_memory", lambda: 1 << 20)
    assert main([bench]) == 3
    assert capsys.readouterr().err.startswith(f"{bench}: skipped: there is no memory for two machines")


def test_when_a_guest_went_on_is_its_qemu_s_word(tmp_path: Path) -> None:
    machine = qemu_machine.Machine(0, tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(machine.events))
        server.listen()
        with resumption(machine) as resumed_at:
            qmp, _ = server.accept()
            with qmp:
                qmp.sendall(b'{"QMP": {}}\n{"return": {}}\n{"event": "STOP"}\n')
                qmp.sendall(b'{"timestamp": {"seconds": 7, "microseconds": 500000}, "event": "RESUME"}\n')
                assert resumed_at() == 7.5
            with pytest.raises(QemuFailed, match="did not say that its guest went on"):
                resumed_at()


def test_a_kind_of_work_is_held_against_itself_alone_in_the_same_round() -> None:
    side = Side(1.0, 2.0, 1.0)
    profiles = [Profile(side, {profile.SEAL: Timed(1, seconds)}, {}, 0.0) for seconds in (1.0, 3.0)]
    idle = Profile(side, {}, {}, 0.0)
    limits = [{profile.SEAL: 1.0, profile.ALL: 4.0}, {profile.SEAL: 2.0, profile.ALL: 2.0}]
    figure = profile._figure(1 << 30, [(MOVED, source, idle) for source in profiles], limits)
    assert figure.times_alone == {
        profile.SEAL: Spread.of([1.0 / 1.0, 3.0 / 2.0]),
        profile.ALL: Spread.of([4.0 / 4.0, 4.0 / 2.0]),
    }


def test_the_parts_alone_take_turns_with_the_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def alone(cases: object, usual: Move) -> dict[str, float]:
        ran.append("alone")
        return {profile.ALL: 1.0}

    def pair(receive: object, send: object, move: Move) -> tuple[tuple[Moved, Profile], Profile]:
        ran.append(f"{move.free}")
        nothing = Profile(MOVED.side, {}, {}, 0.0)
        return (MOVED, nothing), nothing

    monkeypatch.setattr(profile, "_alone", alone)
    monkeypatch.setattr(profile, "run_pair", pair)
    profile.measure({f"{free}": Move(1 << 20, 1, free=free) for free in (0.0, 0.5)}, 3)
    assert ran == ["alone", "0.0", "0.5", "0.0", "0.5", "alone", "0.5", "alone", "0.0"]


def test_a_move_with_an_audit_takes_turns_with_one_without_and_with_what_both_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    class OneMove:
        def __init__(self, memory: object, seed: int, *, audit: bool) -> None:
            self._name = "digest-audit" if audit else "host-reported"

        def run(self) -> dict[str, float]:
            ran.append(self._name)
            return {"pages": 3.0, "manifest": 1.0}

    monkeypatch.setattr(audit, "_Move", OneMove)
    monkeypatch.setattr(audit, "_needed", lambda *_: [Case(lambda: ran.append("alone"))])
    memory = GuestMemory.allocate(1 << 20)
    shares, _ = audit.move_shares(memory, 3, 1)
    memory.close()
    assert ran[1:] == [
        *("alone", "host-reported", "digest-audit"),
        *("host-reported", "digest-audit", "alone"),
        *("digest-audit", "alone", "host-reported"),
    ]
    assert [(share.step, share.part) for share in shares["digest-audit"]] == [
        ("pages", 0.75),
        ("manifest", 0.25),
    ]


def test_a_step_is_held_against_what_a_move_needs_in_the_same_round() -> None:
    (share,) = audit._shares([{"pages": 2.0}, {"pages": 9.0}], [1.0, 3.0])
    assert share.times_alone == Spread.of([2.0, 3.0])


def test_without_memory_for_the_tables_audit_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "available_memory", lambda: 1 << 30)
    assert main(["audit", "--table", "200"]) == 3
    assert "no memory for the tables of a guest of 200 GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["channels", "--bundles", "16,513"], "from 1 to 512"),
        (["channels", "--bundle", "513"], "from 1 to 512"),
        (["channels", "--channel-threads", "some"], "some"),
        (["dirty", "--guests", "1.5GiB"], "not whole GiB"),
        (["dirty", "--guests", "512MiB"], "not whole GiB"),
        (["mailbox", "--slots", "1,127"], "127 are more than 126"),
        (["mailbox", "--ram", "3MiB", "--slots", "4"], "too few"),
        (["convergence", "--link", "0"], "0"),
        (["convergence", "--downtime-limit", "100"], "unit"),
        (["links", "--downtime-limit", "100"], "unit"),
        (["scale", "--memory", "4000TiB"], "there are only"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in bad_usage(argv, capsys)


@pytest.mark.parametrize(
    ("bench", "option", "default"),
    [
        ("channels", "--channels", "1 to 64, quick 1,4,64"),
        ("channels", "--bundles", "16 to 512, quick 16,256"),
        ("limits", "--streams", "1 to 64, quick 1,4"),
        ("mailbox", "--slots", "1,2,4,8, quick 1,4"),
        ("audit", "--table", "1024, quick 64"),
        ("dirty", "--guests", "16GiB,256GiB,1TiB,4TiB, quick 16GiB,1TiB"),
        ("links", "--downtime-limit", "300ms, quick 100ms"),
        ("convergence", "--downtime-limit", "100ms"),
        ("convergence", "--link", "64"),
        ("convergence", "--rates", "16,32,48,64,96, quick 16,48,96"),
        ("convergence", "--guest", "auto"),
    ],
)
def test_help_has_the_defaults_of_both_kinds_of_run(
    bench: str, option: str, default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([bench, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"default: {default}" in said.partition("options:")[2].partition(option)[2]


def test_a_seed_decides_what_is_in_ram(tmp_path: Path) -> None:
    def ram(seed: int) -> bytes:
        with (tmp_path / f"{seed}").open("w+b") as file:
            mailbox.fill(file.fileno(), (1 << 20) + 4096, seed)
            return file.read()

    assert ram(1) == ram(1) != ram(2)
    assert len(ram(1)) == (1 << 20) + 4096
    guests = [audit._guest(1 << 20, seed).words.tobytes() for seed in (1, 1, 2)]
    assert guests[0] == guests[1] != guests[2]


def test_a_seed_reaches_the_guests_of_convergence() -> None:
    ram = []
    for seed in (1, 1, 2):
        job = convergence.Job("simulated", 1 << 20, 0, "plain", pagexfer.MigrationParameters(), seed)
        with convergence._boot(job) as guest:
            ram.append(guest.memory.words.tobytes())
    assert ram[0] == ram[1] != ram[2]


def test_a_tracker_that_is_not_there_has_its_reason_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "unavailable_reason", lambda: "no /dev/kvm")
    _, table = trackers.tracker_table(1 << 20, 1, 1)
    assert "Not measured: KVM's log: no /dev/kvm." in table.note
