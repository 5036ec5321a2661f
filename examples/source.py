"""Migrate a running guest to another host from your own trio program.

python examples/source.py --to 192.0.2.7:4455 --psk-file psk
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import trio

import pagexfer
from pagexfer.guests.checked import boot_guest, start


async def migrate(options: argparse.Namespace) -> int:
    """Run a guest and send it away; returns the exit code."""
    host, port = options.to
    psk = pagexfer.PskAttestor.from_file(options.psk_file)
    with boot_guest(options.guest, options.ram << 20, options.vcpus, options.write_rate << 20) as guest:
        await start(guest)
        try:
            report = await pagexfer.send_guest(guest, host, port, psk, channels=options.channels)
        except pagexfer.TransferAborted as aborted:
            print(f"{aborted} ({aborted.outcome.name.lower()})", file=sys.stderr)
            return aborted.outcome
    print(f"the guest runs at {host}:{port}; it stood still for {report.info.downtime:.0f} ms")
    return pagexfer.Outcome.COMPLETED


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def main() -> int:
    """Read the command line and migrate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", required=True, type=address, metavar="HOST:PORT")
    parser.add_argument("--psk-file", required=True, type=Path)
    parser.add_argument("--guest", choices=["auto", "kvm", "simulated"], default="simulated")
    parser.add_argument("--ram", type=int, default=512, metavar="MIB")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--write-rate", type=int, default=50, metavar="MIB_PER_SECOND")
    options = parser.parse_args()
    try:
        try:
            return trio.run(migrate, options)
        except pagexfer.PagexferError as error:
            print(error, file=sys.stderr)
            return pagexfer.Outcome.USAGE
    except* KeyboardInterrupt:  # trio raises it in a group
        print("interrupted", file=sys.stderr)
    return pagexfer.Outcome.ENDED


if __name__ == "__main__":
    sys.exit(main())
