"""What an engine's process is started for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.source import SourceOptions
from ..engine.steering import MigrationParameters
from ..engine.streams import STALL_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Task:
    """One side of one migration, as the engine needs to know it. `options` to `can_throttle` count at a source only,
    which has its `most_threads` among its options.

    `parameters` are those that it begins with; others come while it runs.
    """

    source: bool
    host: str
    port: int
    ram_pages: int
    vcpus: int
    has_dirty_log: bool
    cpus: tuple[int, ...] = ()
    stall_timeout_s: float = STALL_TIMEOUT_S
    options: SourceOptions = field(default_factory=SourceOptions)
    parameters: MigrationParameters = field(default_factory=MigrationParameters)
    can_throttle: bool = False
    most_threads: int = 0
