"""Receive a guest in your own trio program, let it run on, and check it.

python examples/destination.py --listen 0.0.0.0:4455 --psk-file psk
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import trio

import pagexfer
from pagexfer.guests.checked import empty_guest, prove


async def receive(options: argparse.Namespace) -> int:
    """Receive one guest; returns the exit code."""
    host, port = options.listen
    psk = pagexfer.PskAttestor.from_file(options.psk_file)
    with empty_guest(options.guest, options.ram << 20, options.vcpus) as guest:
        try:
            report = await pagexfer.receive_guest(
                guest,
                host,
                port,
                psk,
                on_listening=lambda actual: print(f"listening at {host}:{actual}", flush=True),
                on_stranger=lambda line: print(line, file=sys.stderr),
            )
        except pagexfer.TransferAborted as aborted:
            print(f"{aborted} ({aborted.outcome.name.lower()})", file=sys.stderr)
            return aborted.outcome
        proof = await prove(guest, seconds=1)
    print(
        f"received in {report.info.total_time:.0f} ms; consistent: {proof.consistent}, goes on: {proof.progressed}"
    )
    return pagexfer.Outcome.COMPLETED if proof.consistent and proof.progressed else pagexfer.Outcome.UNDECIDED


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def main() -> int:
    """Read the command line and receive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--listen", required=True, type=address, metavar="HOST:PORT")
    parser.add_argument("--psk-file", required=True, type=Path)
    parser.add_argument("--guest", choices=["auto", "kvm", "simulated"], default="simulated")
    parser.add_argument("--ram", type=int, default=512, metavar="MIB")
    parser.add_argument("--vcpus", type=int, default=2)
    options = parser.parse_args()
    try:
        try:
            return trio.run(receive, options)
        except pagexfer.PagexferError as error:
            print(error, file=sys.stderr)
            return pagexfer.Outcome.USAGE
    except* KeyboardInterrupt:  # trio raises it in a group
        print("interrupted", file=sys.stderr)
    return pagexfer.Outcome.ENDED


if __name__ == "__main__":
    sys.exit(main())
