"""Channel counts between two machines: a sealed migration against plain TCP, over the network that is between them.

On the destination, which serves one series after the other until it is interrupted:

    python -m bench hosts --listen 0.0.0.0:4460 --psk-file psk [--ram 8GiB] [--data-port 4461] [--once]

On the source, which measures and tells:

    python -m bench hosts --to HOST:4460 --psk-file psk [--ram 2GiB] [--channels 1,2,4,8,16] [--repeats 5]
        [--content NAME] [--write-rate 100MiB/s] [--isolated] [--json FILE] [--plot FILE.png] [--quick] [--seed N]

Both need the same revision of pagexfer and the same pre-shared key. The destination uses two ports: the one it is given,
and --data-port, by default the next one. Both have to be open for the source, and nothing is opened the other way.

In each round, for each number of channels, plain TCP runs over as many connections, and right after it the migration of a
simulated guest with as many bytes of RAM; "of TCP" is the median of the ratios of such pairs. Rounds begin with another
number each. CPU seconds are per GiB of RAM, source and destination, of all processes of a side but vCPUs, from the first
page to the end. "sent again" are the TCP segments that the source's kernel sent again meanwhile, in all of its connections.

It is a measuring tool for a network of one's own, not a service: leave it running no longer than you measure. Who has no
key can do nothing but take its turn for some seconds; what follows the proof of the key is neither encrypted nor
authenticated, but for the migrations. Guests with more RAM than the listener's --ram are refused.

Exit codes: 0 all was measured (with --once: served), 1 something failed or was interrupted, with one line that says what,
2 bad usage. What was measured until then is in the table and the JSON, where "complete" is false. A listener ends with 1
when it is interrupted, which is its usual end.
"""

from __future__ import annotations

import argparse
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from pagexfer import PskAttestor, UsageError
from pagexfer.attestation.psk import readable_by_others

from .channels import CONTENTS
from .hosts_figures import Pair, draw, figures, table
from .hosts_line import Welcome, join, line_key
from .hosts_series import connected, measure, serve, too_much
from .options import channel_numbers, finish, parse, parser, progress, ram, size
from .pair import SideFailed
from .sealed import Move

MIB: Final = 1 << 20
GIB: Final = 1 << 30
MAX_PORT: Final = 65535
INCOMPRESSIBLE: Final = next(iter(CONTENTS))
CHANNELS: Final = (1, 2, 4, 8, 16)
QUICK_CHANNELS: Final = (1, 4)
LIMIT_BYTES: Final = 4 * GIB
# Options that only one of the sides has.
_SOURCE_ONLY: Final = ("channels", "content", "write_rate", "isolated", "quick", "json", "plot")
_DESTINATION_ONLY: Final = ("data_port", "once")


def _measure_and_tell(options: argparse.Namespace) -> None:
    usual = Move(
        options.ram or (GIB // 4 if options.quick else 2 * GIB),
        1,
        CONTENTS[options.content or INCOMPRESSIBLE],
        write_rate_bytes=options.write_rate or 0,
        seed=options.seed,
        isolated=options.isolated,
    )
    channels = options.channels or (QUICK_CHANNELS if options.quick else CHANNELS)
    moves = [replace(usual, channels=number) for number in channels]
    pairs: list[Pair] = []
    with connected(options.to) as control:
        key = line_key(PskAttestor.from_file(options.psk_file))
        welcome = join(control, key, 2 * len(moves) * options.repeats)
        if usual.ram_bytes > welcome.ram_limit_bytes:
            raise SideFailed(too_much(usual.ram_bytes, welcome.ram_limit_bytes))
        try:
            measure(control, moves, options.repeats, options.psk_file, pairs)
        except (SideFailed, KeyboardInterrupt) as ended:
            if pairs:
                _tell(options, usual, welcome, pairs, str(ended) or "interrupted")
            raise
    _tell(options, usual, welcome, pairs, "")


def _tell(options: argparse.Namespace, usual: Move, welcome: Welcome, pairs: list[Pair], ended: str) -> None:
    found, rtt_ms = figures(pairs), min(pair.round_trip_ms for pair in pairs)
    content = options.content or INCOMPRESSIBLE
    writes = f"{usual.write_rate_bytes / 1e6:.0f} MB/s written" if usual.write_rate_bytes else "idle"
    engines = "isolated" if usual.isolated else "local"
    title = (
        f"Between two machines, {usual.ram_bytes // MIB} MiB, {content}, {writes}, engines {engines}, "
        f"round trip {rtt_ms:.2f} ms"
    )
    destination = asdict(welcome)
    del destination["proof"]
    finish(
        options,
        {
            "complete": not ended,
            "ended": ended,
            "content": content,
            "ram_bytes": usual.ram_bytes,
            "write_rate_bytes": usual.write_rate_bytes,
            "downtime_limit_ms": usual.downtime_limit_s * 1000,
            "isolated": usual.isolated,
            "round_trip_ms": rtt_ms,
            "destination": destination,
            "figures": [asdict(figure) for figure in found],
            "runs": [{**asdict(pair), "of_tcp": pair.of_tcp} for pair in pairs],
        },
        [table(f"{title}{', not complete' if ended else ''}", found)],
        lambda path: draw(found, path),
    )


# Options


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, as the pagexfer command takes it."""
    import click

    from pagexfer.cli.values import Address

    try:
        host, number = Address().convert(text, None, None)
        host.encode("idna")
    except click.UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r} has no host name") from None
    return host, number


def port(text: str) -> int:
    """A port number; 0 lets the kernel choose."""
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {MAX_PORT}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    made = parser("hosts", __doc__, repeats=5, quick_repeats=2, plots=True)
    side = made.add_mutually_exclusive_group(required=True)
    side.add_argument("--to", type=address, metavar="HOST:PORT", help="source: the destination's listener")
    side.add_argument("--listen", type=address, metavar="HOST:PORT", help="destination: where to listen")
    made.add_argument(
        "--psk-file", type=Path, required=True, metavar="FILE", help="the pre-shared key, for both sides"
    )
    made.add_argument(
        "--ram",
        type=ram,
        help="of the guest (default: 2GiB, quick 256MiB); listener: at most (default: 4GiB)",
    )
    made.add_argument(
        "--channels", type=channel_numbers, metavar="N,N", help="default: 1,2,4,8,16, quick 1,4"
    )
    made.add_argument("--content", choices=list(CONTENTS), help=f"of RAM (default: {INCOMPRESSIBLE})")
    made.add_argument(
        "--write-rate", type=size, metavar="RATE", help="what the guest writes a second (default: 0)"
    )
    made.add_argument(
        "--isolated", action="store_true", help="engines in processes of their own, on both sides"
    )
    made.add_argument(
        "--data-port", type=port, metavar="PORT", help="listener: of the runs (default: the next)"
    )
    made.add_argument("--once", action="store_true", help="listener: end with the first series")
    return made


def main(argv: list[str] | None = None) -> None:
    made = _parser()
    options = parse(made, argv)
    foreign = _SOURCE_ONLY if options.listen else _DESTINATION_ONLY
    for name in foreign:
        if getattr(options, name):
            made.error(f"--{name.replace('_', '-')} is for the {'source' if options.listen else 'listener'}")
    try:
        PskAttestor.from_file(options.psk_file)
    except UsageError as error:
        made.error(str(error))
    if readable_by_others(options.psk_file):
        progress(f"hosts: warning: others can read the key: run 'chmod 600 {options.psk_file}'")
    if options.to is not None:
        _measure_and_tell(options)
        return
    try:
        server, data_port = _listen(options.listen, options.data_port)
    except OSError as error:
        made.error(f"cannot listen: {error.strerror or error}")
    limit = options.ram or LIMIT_BYTES
    with server:
        progress(
            f"hosts: listening at {options.listen[0]}:{server.getsockname()[1]}, "
            f"runs at port {data_port or 'any'}, guests of up to {limit // MIB} MiB"
        )
        serve(server, data_port, limit, options.psk_file, once=options.once)


def _listen(address: tuple[str, int], data_port: int | None) -> tuple[socket.socket, int]:
    """The socket for control lines, and the port for runs, which is free as yet. Raises OSError."""
    host, control_port = address
    family, _, _, _, where = socket.getaddrinfo(host, control_port, type=socket.SOCK_STREAM)[0]
    if data_port is None:
        data_port = control_port + 1 if control_port else 0  # 0, the kernel's choice, for both
    if data_port > MAX_PORT:
        raise OSError(f"there is no port after {control_port}: give --data-port")
    server = socket.create_server(where[:2], family=family)
    try:
        socket.create_server((where[0], data_port), family=family).close()
    except OSError:
        server.close()
        raise
    return server, data_port


if __name__ == "__main__":
    main()
