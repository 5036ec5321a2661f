"""Units that several benches count in. MB and GB are the network's; MiB and GiB are what RAM is counted in."""

from __future__ import annotations

from typing import Final

MB: Final = 1_000_000
MIB: Final = 1 << 20
GIB: Final = 1 << 30
