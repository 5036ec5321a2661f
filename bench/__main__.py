"""All benches behind one command: python -m bench NAME [options]

    python -m bench                     names them
    python -m bench NAME --help         what a bench measures, and its options
    python -m bench all [--quick] [--repeats N] [--json FILE] [--plots FOLDER]
    python -m bench report FILE         the tables of docs/performance.md, from the results of `all`

Exit codes: 0 measured, 1 a bench failed or was interrupted, 2 bad usage, 3 this machine cannot run the bench.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from .names import BENCHES, COMMANDS
from .options import CannotRun
from .pair import SideFailed


def main(argv: list[str] | None = None) -> int:
    """Run what the first argument names; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {name:<12} {about}" for name, about in {**BENCHES, **COMMANDS}.items()))
        return 0 if arguments else 2
    name = arguments[0]
    if name not in BENCHES and name not in COMMANDS:
        print(f"bench: no bench {name!r}: there are {', '.join([*BENCHES, *COMMANDS])}", file=sys.stderr)
        return 2
    try:
        _run(name, arguments[1:])
    except CannotRun as reason:
        print(f"{name}: skipped: {reason}", file=sys.stderr)
        return 3
    except SideFailed as failed:
        print(f"{name}: failed: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 1
    return 0


def _run(name: str, argv: list[str]) -> None:
    # Imported by name: a bench's libraries, and what they cost to load, are its own.
    module = f"{__package__}.{'suite' if name == 'all' else name}"
    if find_spec(module) is None:
        raise CannotRun("it is not part of this checkout")
    if find_spec("click") is None:
        raise CannotRun("benches need the cli extra: pip install 'pagexfer[cli]'")
    import_module(module).main(argv)


if __name__ == "__main__":
    sys.exit(main())
