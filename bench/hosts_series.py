"""Both sides of a series of `hosts`: what they say to each other, and the runs in between.

Either side waits for two at a time, the process that does its part of the run and the other side, and ends both where one
of them fails.
"""

from __future__ import annotations

import socket
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from pagexfer import PskAttestor

from .hosts_figures import Pair, Plain, Sealed
from .hosts_line import (
    MOVE,
    PLAIN,
    PROMPT_S,
    Done,
    Failed,
    Listening,
    Run,
    Welcome,
    keep_alive,
    line_key,
    offer,
    printable,
    receive_line,
    refuse,
    round_trip_s,
    send_line,
)
from .hosts_runs import receive_move, receive_plain, send_move, send_plain, side_process
from .measure import environment
from .options import progress
from .pair import Side, SideFailed
from .sealed import Move, Moved

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

Said = TypeVar("Said")

MIB: Final = 1 << 20
# A destination provides all RAM of a guest before it listens, and the largest have a TiB.
PREPARE_S: Final = 300.0
# The longest that a run may take: what never ends is not measured.
RUN_S: Final = 3600.0
# What the source does between two runs takes no time.
NEXT_S: Final = 30.0


# The destination


def serve(server: socket.socket, data_port: int, ram_limit_bytes: int, psk_file: Path, *, once: bool) -> None:
    """One series after the other; with `once` only one. Raises SideFailed where that one fails."""
    key = line_key(PskAttestor.from_file(psk_file))
    while True:
        try:
            control, address = server.accept()
        except ConnectionError:
            continue  # gone already
        source, runs = address[0], 0
        try:
            with control:
                keep_alive(control)
                runs = offer(control, key, partial(_welcome, ram_limit_bytes))
                progress(f"hosts: {source} measures: {runs} runs")
                for _ in range(runs):
                    _serve_run(control, server.getsockname()[0], data_port, ram_limit_bytes, psk_file)
        except (SideFailed, OSError) as failed:
            if once and runs:  # who has not the key has no series
                raise SideFailed(f"{source}: {failed}") from None
            progress(f"hosts: {source}: {failed}")
            continue
        progress(f"hosts: {source}: all measured")
        if once:
            return


def _serve_run(
    control: socket.socket, host: str, data_port: int, ram_limit_bytes: int, psk_file: Path
) -> None:
    """The destination's side of one run. What fails is told to the source as well."""
    run = receive_line(control, Run, NEXT_S)
    try:
        if run.ram_bytes > ram_limit_bytes:
            raise SideFailed(too_much(run.ram_bytes, ram_limit_bytes))
        with _receiving(run, host, data_port, _peer(control), psk_file) as pipe:
            send_line(control, Listening(_await(int, pipe, control, PREPARE_S)))
            send_line(control, _await(Done, pipe, control, RUN_S))
    except SideFailed as failed:
        refuse(control, str(failed))
        raise


def _receiving(
    run: Run, host: str, port: int, source: str, psk_file: Path
) -> AbstractContextManager[Connection]:
    if run.what == PLAIN:
        return side_process(receive_plain, run, host, port, source)
    if run.what == MOVE:
        return side_process(receive_move, run, host, port, psk_file)
    raise SideFailed(f"there is no run of the name {run.what!r}")


def _await(kind: type[Said], pipe: Connection, control: socket.socket, timeout_s: float) -> Said:
    """What the process of this side says, as long as the other side waits for it."""
    ready = wait([pipe, control], timeout_s)
    if pipe in ready:
        said = _said(pipe)
        if isinstance(said, Failed):
            raise SideFailed(said.text)
        assert isinstance(said, kind)
        return said
    if control in ready:
        raise SideFailed("the other side speaks out of turn" if _more(control) else "the other side is gone")
    raise SideFailed(f"a run takes longer than {timeout_s:g} s")


def _more(control: socket.socket) -> bool:
    try:
        return bool(control.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _welcome(ram_limit_bytes: int, proof: str) -> Welcome:
    about = environment()
    revision, python, kernel, cpu = (
        printable(str(about[name])) for name in ("revision", "python", "kernel", "cpu")
    )
    return Welcome(proof, ram_limit_bytes, revision, python, kernel, cpu, int(about["cpus"]))


def too_much(ram_bytes: int, limit_bytes: int) -> str:
    return (
        f"the destination takes guests of up to {limit_bytes // MIB} MiB, not {ram_bytes // MIB} MiB: "
        "its listener's --ram says how much"
    )


# The source


def measure(
    control: socket.socket, moves: list[Move], repeats: int, psk_file: Path, pairs: list[Pair]
) -> None:
    """Every move with the plain TCP before it, `repeats` times; adds each pair to `pairs` as soon as it is there."""
    for number in range(repeats):
        first = number % len(moves)
        for move in moves[first:] + moves[:first]:
            progress(f"hosts: round {number + 1} of {repeats}, channels: {move.channels}")
            plain, sealed = _plain(control, move), _sealed(control, move, psk_file)
            rtt_ms = round_trip_s(control) * 1000
            pairs.append(Pair(number + 1, move.channels, move.ram_bytes, rtt_ms, plain, sealed))


def _plain(control: socket.socket, move: Move) -> Plain:
    run, before = Run(PLAIN, move.ram_bytes, move.channels), segments_sent_again()
    side, done = _run(control, run, Side, send_plain, run)
    return Plain(side.seconds, (side.cpu_seconds, done.cpu_seconds), segments_sent_again() - before)


def _sealed(control: socket.socket, move: Move, psk_file: Path) -> Sealed:
    run, before = Run(MOVE, move.ram_bytes, move.channels, move.isolated), segments_sent_again()
    moved, done = _run(control, run, Moved, partial(send_move, psk_file=psk_file), move)
    if moved.converged and done.failure:
        raise SideFailed(f"at the destination: {done.failure}")
    return Sealed(
        moved.moving_s,
        (moved.side.cpu_seconds, done.cpu_seconds),
        segments_sent_again() - before,
        moved.converged,
        moved.downtime_s * 1000,
        moved.epochs,
        moved.sent_bytes,
        moved.dirty_pages_per_s,
    )


def _run(
    control: socket.socket, run: Run, kind: type[Said], send: Callable[..., Said], job: Run | Move
) -> tuple[Said, Done]:
    """One run: what the process of this side and what the destination say of it."""
    send_line(control, run)
    port = receive_line(control, Listening, PREPARE_S).port
    with side_process(send, job, _peer(control), port) as pipe:
        ready = wait([pipe, control], RUN_S)
        # The destination's word may come first: then this side's is on its way, unless it failed there.
        done = receive_line(control, Done) if control in ready and pipe not in ready else None
        if not ready or not pipe.poll(PREPARE_S):
            raise SideFailed("a run does not end")
        said = _said(pipe)
    if isinstance(said, Failed):
        raise SideFailed(_why(said.text, control))
    assert isinstance(said, kind)
    return said, done or receive_line(control, Done, PREPARE_S)


def _peer(control: socket.socket) -> str:
    try:
        return str(control.getpeername()[0])
    except OSError:
        raise SideFailed("the other side is gone") from None


def _said(pipe: Connection) -> object:
    try:
        return pipe.recv()
    except EOFError:
        raise SideFailed("a process ended without a result") from None


def _why(text: str, control: socket.socket) -> str:
    """What this side knows of a failure, and what the destination says of it."""
    try:
        there = receive_line(control, Done).failure
    except SideFailed as failed:
        there = str(failed)
    return f"{text}; {there}" if there else text


def segments_sent_again() -> int:
    """TCP segments that this host, or its network namespace, has sent again so far."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def connected(address: tuple[str, int]) -> socket.socket:
    """The control line's connection. Raises SideFailed."""
    try:
        control = socket.create_connection(address, PROMPT_S)
        keep_alive(control)
    except OSError as error:
        named = f"{address[0]}:{address[1]}"
        raise SideFailed(
            f"cannot connect to {named}: {error.strerror or error}: is the listener there?"
        ) from None
    return control
