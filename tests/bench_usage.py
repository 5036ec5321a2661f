"""What a bench says of options that it cannot take."""

from __future__ import annotations

import pytest

from bench.__main__ import main


def bad_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a bench that refuses its options, before anything is measured."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
