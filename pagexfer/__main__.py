"""The `pagexfer` command. Its own dependencies are the `cli` extra."""

from __future__ import annotations

import sys

from .errors import Outcome


def run() -> None:
    """Run the command and exit with its code."""
    try:
        import click  # noqa: F401
    except ModuleNotFoundError:
        print("pagexfer: the command needs the cli extra: pip install 'pagexfer[cli]'", file=sys.stderr)
        sys.exit(Outcome.USAGE)
    from .cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
