"""What the bench between two machines makes of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import hosts_figures

if TYPE_CHECKING:
    from pathlib import Path


def pair(channels: int, seconds: float, *, converged: bool = True) -> hosts_figures.Pair:
    return hosts_figures.Pair(
        1,
        channels,
        1 << 30,
        0.1,
        hosts_figures.Plain(0.5, (0.25, 0.25), 1),
        hosts_figures.Sealed(seconds, (0.5, 0.75), 2, converged, 10.0, 2, 1 << 31, 0.0),
    )


def test_figures_are_of_pairs_and_of_moves_that_converged() -> None:
    one, two, four = hosts_figures.figures(
        [
            pair(2, 1.0),
            pair(1, 2.0),
            pair(2, 0.5),
            pair(2, 9.0, converged=False),
            pair(4, 9.0, converged=False),
        ]
    )
    assert (one.channels, two.channels, four.channels) == (1, 2, 4)
    assert (two.runs, two.converged) == (3, 2)
    assert two.of_tcp is not None
    assert (two.of_tcp.median, two.of_tcp.minimum, two.of_tcp.maximum) == pytest.approx((0.75, 0.5, 1.0))
    assert two.cpu_s_per_gib[1].median == pytest.approx(0.75)
    assert two.sent_of_ram.median == pytest.approx(2.0)
    assert (four.gb_per_s, four.of_tcp, four.downtime_ms) == (None, None, None)
    assert "0 of 1" in hosts_figures.table("title", [four]).text()
    assert "No move converged" in hosts_figures.advice([four])


def test_a_slow_network_has_rates_with_digits_too() -> None:
    (slow,) = hosts_figures.figures([pair(1, 80.0)])
    plain, sealed = hosts_figures.table("title", [slow]).rows
    assert (plain[2], sealed[2]) == ("2.15", "0.0134")


def test_the_advice_is_the_fewest_channels_that_are_as_good() -> None:
    found = hosts_figures.figures([pair(1, 2.0), pair(2, 1.02), pair(4, 1.0), pair(8, 1.5)])
    assert hosts_figures.advice(found).startswith(
        "RAM moved fastest over 4 channels; the fewest that come within 5% of that: 2."
    )


def test_a_plot_without_a_move_that_converged_is_one(tmp_path: Path) -> None:
    hosts_figures.draw(hosts_figures.figures([pair(4, 9.0, converged=False)]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
