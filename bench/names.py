"""The benches by name, in the order in which `all` runs them; each is a module of this package."""

from __future__ import annotations

from typing import Final

BENCHES: Final = {
    "limits": "what this machine can do: TCP, AES-GCM, memory, doorbells",
    "channels": "a sealed migration against plain TCP, over 1 to 64 channels",
    "profile": "where the CPU seconds of a migration go, by kind of work",
    "links": "limited flows: which write rate converges over how many channels",
    "scale": "what a larger guest costs, and what follows for 1 TiB",
    "convergence": "write rate against each policy; predicted against actual downtime",
    "dirty": "bitmap operations and dirty trackers against memory bandwidth",
    "mailbox": "slots between two processes: doorbells, handshakes per GiB, handlers, --isolated",
    "qemu": "against QEMU's own multifd migration, plain and with TLS",
    "compression": "zstd on slow links, against QEMU's multifd with zstd",
    "handshake": "the handshake with a pre-shared key and with reports",
    "audit": "digest audit, tokens and manifest against the move",
}
COMMANDS: Final = {
    "hosts": "channel counts between two machines: no part of `all`, which has one",
    "all": "every bench in turn, in one result file",
    "report": "the tables of docs/performance.md from a result file",
}
# Those of them that draw.
PLOTTED: Final = ("channels", "links", "scale", "convergence", "mailbox", "qemu")
