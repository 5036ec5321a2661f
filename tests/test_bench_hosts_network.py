"""The bench between two machines, with a network between them: two network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from .bench_hosts import (
    SMALL,
    hosts,
    key_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def psk(tmp_path: Path) -> str:
    return key_file(tmp_path)


@pytest.fixture
def link() -> Iterator[tuple[str, str, str]]:
    """Two network namespaces with a pair of devices between them, and the address of the second."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("there is no ip or no tc: both are part of iproute2")
    near, far = (f"pagexfer-hosts-{os.getpid()}-{end}" for end in "ab")
    try:
        for command in (
            f"ip netns add {near}",
            f"ip netns add {far}",
            f"ip link add a0 netns {near} type veth peer name b0 netns {far}",
            f"ip -n {near} address add 10.93.1.1/30 dev a0",
            f"ip -n {far} address add 10.93.1.2/30 dev b0",
            f"ip -n {near} link set a0 up",
            f"ip -n {far} link set b0 up",
        ):
            _need(command)
        yield near, far, "10.93.1.2"
    finally:
        for name in (near, far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _need(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command}: {done.stderr.strip()}")


def measured_over(link: tuple[str, str, str], psk: str, result: Path) -> dict[str, Any]:
    near, far, address = link
    with hosts("--listen", "0.0.0.0:4460", "--psk-file", psk, "--once", namespace=far) as destination:
        assert destination.line_with("listening at ") == (
            "hosts: listening at 0.0.0.0:4460, runs at port 4461, guests of up to 4096 MiB"
        )
        to = "--to", f"{address}:4460", "--psk-file", psk, "--json", str(result)
        with hosts(*to, *SMALL, "--repeats", "1", namespace=near) as source:
            assert source.end()[0] == 0
        assert destination.end()[0] == 0
        assert "hosts: 10.93.1.1: all measured" in destination.lines
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def test_two_hosts_with_a_network_between_them(link: tuple[str, str, str], psk: str, tmp_path: Path) -> None:
    # One packet in 20 MB/s more than the link takes waits, and one that finds no place is sent again.
    _need(f"tc -n {link[0]} qdisc add dev a0 root tbf rate 20mbps burst 64kb limit 64kb")
    measured = measured_over(link, psk, tmp_path / "hosts.json")
    assert measured["complete"]
    for run in measured["runs"]:
        assert run["plain"]["seconds"] > 0.8 * (4 << 20) / 20e6
        assert run["sealed"]["seconds"] > 0.8 * (4 << 20) / 20e6
    assert sum(run[kind]["sent_again"] for run in measured["runs"] for kind in ("plain", "sealed")) > 0


def test_a_delay_is_seen_in_the_round_trip(link: tuple[str, str, str], psk: str, tmp_path: Path) -> None:
    _need(f"tc -n {link[0]} qdisc add dev a0 root netem delay 5ms")
    measured = measured_over(link, psk, tmp_path / "hosts.json")
    assert 5 <= measured["round_trip_ms"] < 100
