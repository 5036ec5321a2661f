"""All benches behind one command: python -m bench NAME [options]

    python -m bench                     names them
    python -m bench NAME --help         what a bench measures, and its options
    python -m bench all [--quick] [--repeats N] [--only NAME,NAME] [--json FILE] [--plots FOLDER]
    python -m bench report FILE ...     the tables of docs/performance.md, from what --json wrote

Exit codes: 0 measured; 1 a bench failed or was interrupted (SIGINT, SIGTERM, SIGHUP), or a file could not be written; 2 bad
usage; 3 this machine cannot run the bench. One line says which and why; a traceback is a defect.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .names import BENCHES, COMMANDS
from .options import CannotRun, why

if TYPE_CHECKING:
    from types import FrameType


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
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        end = why(error)
        if end is None:
            raise
        code, line = end
        print(f"{name}: {line}", file=sys.stderr)
        return code
    return 0


def _run(name: str, argv: list[str]) -> None:
    # Imported by name: a bench's libraries, and what they cost to load, are its own.
    module = f"{__package__}.{'suite' if name == 'all' else name}"
    if find_spec(module) is None:
        raise CannotRun("it is not part of this checkout")
    if find_spec("click") is None:
        raise CannotRun("benches need the cli extra: pip install 'pagexfer[cli]'")
    import_module(module).main(argv)


def _interrupt_on_every_end() -> None:
    """Have SIGTERM and SIGHUP do what SIGINT does, for a bench has processes, files and namespaces to end.

    One that is ignored stays so, as SIGHUP under nohup.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job of a shell in the background
        # trio guards its own code against interrupts only where SIGINT has Python's handler, which nobody calls then.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal that goes away may send more than one, and the second must not end what the first one cleans up.
    for later in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(later, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)  # trio's, while it runs
    assert callable(handler)
    handler(signal.SIGINT, frame)


if __name__ == "__main__":
    _interrupt_on_every_end()
    sys.exit(main())
