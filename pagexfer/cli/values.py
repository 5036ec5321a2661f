"""Values as people write them on a command line: sizes, times, addresses."""

from __future__ import annotations

import re
from typing import Final

import click

from ..svsm.compression import DEFAULT_LEVEL, MAX_LEVEL, MIN_LEVEL
from ..wire.constants import PAGE_SIZE

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(|B|[KMGT]i?B?)(?:/s)?", re.IGNORECASE)
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms)", re.IGNORECASE)
_COMPRESSION: Final = re.compile(r"zstd(?::(\d{1,2}))?")
_CPUS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_MAX_CPUS: Final = 8192
_MIN_RAM_BYTES: Final = 1 << 20
_UNITS: Final = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_MAX_SECONDS: Final = 10**9  # thirty years; what has a bound of its own says so itself
_MAX_BYTES: Final = 2**52  # all that x86-64 can address


class Size(click.ParamType[int]):
    """A size in bytes: 512MiB, 2GiB, 4096. Units are powers of two, with or without the i."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        size = float(match[1]) * _UNITS[match[2].lower()[:1]] if match else -1
        if size < 0 or size != int(size) or size > _MAX_BYTES:
            self.fail(f"{value!r} is not a size: write it like 512MiB or 2GiB", param, ctx)
        return int(size)


class Ram(Size):
    """RAM of a guest. A number without its unit is bytes as anywhere, hence never what was meant."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size_bytes = super().convert(value, param, ctx)
        if size_bytes < _MIN_RAM_BYTES or size_bytes % PAGE_SIZE:
            self.fail(
                f"{str(value)!r} is no RAM of a guest: write it like 512MiB, 1MiB or more in whole pages",
                param,
                ctx,
            )
        return size_bytes


class Seconds(click.ParamType[float]):
    """A time above zero, in seconds: 300ms, 1.5s. It needs its unit, as every status and report has milliseconds."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = _TIME.fullmatch(str(value).strip())
        seconds = float(match[1]) / (1000 if match[2].lower() == "ms" else 1) if match else 0
        if not seconds > 0:
            self.fail(
                f"{value!r} is not a time above zero with its unit: write it like 300ms or 2s", param, ctx
            )
        if seconds > _MAX_SECONDS:
            self.fail(f"{value!r} is too long: a time is at most {_MAX_SECONDS}s", param, ctx)
        return seconds


class Compression(click.ParamType[int]):
    """zstd or zstd:LEVEL; the level."""

    name = "zstd[:level]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _COMPRESSION.fullmatch(str(value).strip())
        level = int(match[1] or DEFAULT_LEVEL) if match else 0
        if not MIN_LEVEL <= level <= MAX_LEVEL:
            self.fail(f"{value!r} is not zstd or zstd:{MIN_LEVEL} to zstd:{MAX_LEVEL}", param, ctx)
        return level


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT, an IPv6 host in brackets."""

    name = "host:port"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        # The last part of an IPv6 address without a port would be taken for one.
        bracketed = host == f"[{bare}]" if ":" in host else host == bare
        if (
            not colon
            or not bare
            or not bracketed
            or not port.isascii()
            or not port.isdecimal()
            or int(port) > 65535
        ):
            self.fail(
                f"{value!r} is not HOST:PORT: write it like 192.0.2.7:4455 or [2001:db8::7]:4455", param, ctx
            )
        return bare, int(port)


class Cpus(click.ParamType[tuple[int, ...]]):
    """Processor numbers: 0,2-3; empty for none."""

    name = "list"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers: set[int] = set()
        for part in filter(None, str(value).split(",")):
            match = _CPUS.fullmatch(part.strip())
            first = int(match[1]) if match else 0
            last = int(match[2] or match[1]) if match else -1
            if not first <= last < _MAX_CPUS:
                self.fail(f"{value!r} is no list of CPUs: write it like 0,2-3", param, ctx)
            numbers.update(range(first, last + 1))
        return tuple(sorted(numbers))
