"""Two network namespaces with a link of a given rate between them, on which each flow has a class and a limit of its own.

This is what a cloud does to one flow, made from what every Linux has: a pair of virtual devices and, at the sender's end,
HTB with one class a source port. It needs root, `ip` and `tc`. Nothing in it reaches another network, and it ends with its
context. Its names have the number of this process, so that several can be there; a process that is killed leaves its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .options import CannotRun

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of the range for local use only (RFC 1918); in namespaces of their own it cannot meet an address that is in use.
SENDER_ADDRESS: Final = "10.93.0.1"
RECEIVER_ADDRESS: Final = "10.93.0.2"

# The sender's ports: no migration over the link has more connections, and each has a class of it.
PORTS: Final = 80
_FIRST_PORT: Final = 20000
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
# HTB lets a class that was silent send so much at once; also what one look at the clock is worth at these rates.
_BURST_BYTES: Final = 64 * 1024


@contextmanager
def shaped_link(link_bytes_per_s: int, flow_bytes_per_s: int) -> Iterator[tuple[str, str]]:
    """Sender's and receiver's namespace, and a link between them. Raises CannotRun where this process may not make them."""
    _require_tools()
    with ExitStack() as stack:
        sender, receiver = (stack.enter_context(_namespace(end)) for end in ("a", "b"))
        _connect(sender, receiver)
        _shape(sender, link_bytes_per_s, flow_bytes_per_s)
        yield sender, receiver


@contextmanager
def _namespace(end: str) -> Iterator[str]:
    name = f"pagexfer-bench-{os.getpid()}-{end}"
    _delete(name)  # of one that was killed and had our number, if it is there at all
    _ip("netns", "add", name)
    try:
        yield name
    finally:
        _delete(name)


def _delete(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a namespace; nothing for an empty name."""
    if not namespace:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter namespace {namespace}: {os.strerror(error)}")


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise CannotRun("network namespaces need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise CannotRun(f"there is no {tool}: it is part of iproute2")


def _connect(sender: str, receiver: str) -> None:
    _ip("link", "add", "a0", "netns", sender, "type", "veth", "peer", "name", "b0", "netns", receiver)
    for namespace, device, address in ((sender, "a0", SENDER_ADDRESS), (receiver, "b0", RECEIVER_ADDRESS)):
        _ip("-n", namespace, "address", "add", f"{address}/30", "dev", device)
        _ip("-n", namespace, "link", "set", device, "up")


def _shape(sender: str, link_bytes_per_s: int, flow_bytes_per_s: int) -> None:
    ports = range(_FIRST_PORT, _FIRST_PORT + PORTS)
    _call(
        "ip",
        "netns",
        "exec",
        sender,
        "sysctl",
        "-qw",
        f"net.ipv4.ip_local_port_range={ports[0]} {ports[-1]}",
    )
    link, flow = f"{link_bytes_per_s}bps", f"{min(flow_bytes_per_s, link_bytes_per_s)}bps"
    # HTB gives every class its own rate whatever its parent has, and shares the parent's rate for what is above. So all
    # classes together have no more than the link of their own, and the limit of a flow is its ceiling.
    share = f"{link_bytes_per_s // PORTS}bps"
    lines = [
        "qdisc add dev a0 root handle 1: htb r2q 1000",
        f"class add dev a0 parent 1: classid 1:1 htb rate {link} burst {_BURST_BYTES} cburst {_BURST_BYTES}",
    ]
    for number, port in enumerate(ports, start=16):
        lines.append(
            f"class add dev a0 parent 1:1 classid 1:{number:x} htb rate {share} ceil {flow} "
            f"burst {_BURST_BYTES} cburst {_BURST_BYTES} quantum 65536"
        )
        lines.append(
            f"filter add dev a0 parent 1: protocol ip prio 1 u32 match ip sport {port} 0xffff flowid 1:{number:x}"
        )
    _call("ip", "netns", "exec", sender, "tc", "-batch", "-", given="\n".join(lines))


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str, given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CannotRun(f"{command[0]} cannot set up the link: {said[0]}")
