"""How limited links are compared: what a flow gets, and when a rate is reached."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import replace

import pytest

from bench import links
from bench.namespace import shaped_link
from bench.options import CannotRun
from bench.pair import Route, Side
from bench.relay import paced_relay
from bench.sealed import Move, Moved

from .bench_usage import bad_usage

MOVED = Moved(Side(1.0, 1.0, 1.0), True, 1.0, 0.05, 3, 1, 10_000_000, 100.0)


def of_link(verdicts: str, rates_mb: list[int], monkeypatch: pytest.MonkeyPatch) -> list[links.Figure]:
    """Figures of migrations over one channel that converge (+) or do not (-), three rounds of each rate."""
    given = iter(verdicts)

    def run_move(move: Move, route: Route) -> tuple[Moved, None]:
        return replace(MOVED, converged=next(given) == "+", arrived_bytes=5_000_000), None

    monkeypatch.setattr(links, "run_move", run_move)
    figures = links.measure(links.Link(40), Move(32 << 20, 1), [1], rates_mb, 3)
    assert next(given, "") == ""
    return figures


def test_links_stops_for_all_rounds_after_a_rate_that_failed_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = of_link("++++-+", [20, 60, 80], monkeypatch)
    assert [(f.write_mb_per_s, f.converged, f.runs) for f in figures] == [(20, 3, 3), (60, 2, 3)]
    table = links.table(links.Link(40), Move(32 << 20, 1), figures)
    assert table.rows[1][4] == "2 of 3"
    assert table.note == "Converged in every round: 1 channel up to 20 MB/s, not at 60 MB/s."


def test_reached_is_the_largest_rate_below_the_first_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = of_link("---", [20, 60], monkeypatch)
    passed = [replace(figures[0], write_mb_per_s=rate, converged=3) for rate in (10, 80)]
    assert links.reach_note([*passed, figures[0]]).endswith("1 channel up to 10 MB/s, not at 20 MB/s.")
    assert links.reach_note(figures).endswith("1 channel at no rate, not at 20 MB/s.")
    assert links.reach_note(passed).endswith("up to 80 MB/s, the highest that was tried.")


def test_what_arrived_is_what_used_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_link("+++", [20], monkeypatch)[0].link_used.median == pytest.approx(5 / 40)


def test_a_link_that_one_flow_cannot_share_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(links, "run_move", lambda move, route: (MOVED, None))
    links.main(["--channels", "1", "--flows", "40", "--rates", "20", "--repeats", "1"])
    said = capsys.readouterr().out
    assert said.count("MB/s a flow") == 1
    assert "A shared link was not measured: one flow alone does not share it." in said


def test_links_takes_as_many_channels_as_a_link_has_ports(capsys: pytest.CaptureFixture[str]) -> None:
    assert "80 ports, not 81" in bad_usage(["links", "--channels", "1,81"], capsys)


def test_a_relay_holds_little_of_a_flow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as source:
        # A flow so slow that whatever is taken at once waits in the relay.
        with paced_relay(server.getsockname()[1], 1000) as port:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            source.connect(("127.0.0.1", port))
            source.settimeout(0.5)
            taken = 0
            with contextlib.suppress(TimeoutError):
                for _ in itertools.count():
                    taken += source.send(bytes(1 << 14))
        assert taken < 2_000_000


def test_links_of_two_processes_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def there() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    with ExitStack() as stack:
        try:
            sender, receiver = stack.enter_context(shaped_link(1_000_000, 1_000_000))
        except CannotRun as reason:
            pytest.skip(str(reason))
        monkeypatch.setattr("os.getpid", lambda: 1)
        with shaped_link(1_000_000, 1_000_000) as others:
            assert not {sender, receiver} & set(others)
        assert {sender, receiver} <= set(there().replace("(", " ").split())
    assert sender not in there()


def test_what_a_killed_process_left_does_not_stop_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        try:
            sender, _ = stack.enter_context(shaped_link(1_000_000, 1_000_000))
        except CannotRun as reason:
            pytest.skip(str(reason))
        with shaped_link(1_000_000, 1_000_000) as (again, _):
            assert again == sender
