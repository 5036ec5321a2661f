"""Which of several failures is the one that the user sees."""

from __future__ import annotations

from itertools import combinations

import pytest
import trio

from pagexfer.engine.failure import first_failure
from pagexfer.errors import (
    ChannelBroken,
    ChannelClosed,
    GuestError,
    Outcome,
    PagexferError,
    RefusalCode,
    SvsmRefused,
    TransferAborted,
)

# What explains most first. A refusal for the session's state is what another channel's refusal leaves behind it.
_BY_RANK: list[PagexferError] = [
    TransferAborted(Outcome.ENDED, "cancelled", "said by this side"),
    SvsmRefused(RefusalCode.INTEGRITY, "IMPORT"),
    SvsmRefused(RefusalCode.STATE, "IMPORT"),
    GuestError("a guest"),
    ChannelBroken("the peer went"),
    ChannelClosed("this side went"),
]


@pytest.mark.parametrize(("better", "worse"), list(combinations(_BY_RANK, 2)))
def test_what_explains_more_is_shown_in_any_order(better: PagexferError, worse: PagexferError) -> None:
    for failures in ([better, worse], [worse, better]):
        assert first_failure(ExceptionGroup("all", failures)) is better
        assert first_failure(ExceptionGroup("all", [ExceptionGroup("inner", failures)])) is better


def test_what_a_side_only_heard_of_explains_less_than_what_was_refused() -> None:
    heard = TransferAborted(Outcome.ENDED, "destination-failed", "it failed")
    refused = SvsmRefused(RefusalCode.STATE, "EXPORT")
    assert first_failure(ExceptionGroup("all", [heard, refused])) is refused


def test_a_cancel_alone_is_no_failure() -> None:
    async def cancelled() -> BaseException | None:
        caught: list[BaseException] = []
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except BaseException as error:
                caught.append(error)
                raise
        return first_failure(caught[0])

    assert trio.run(cancelled) is None


def test_a_defect_is_raised_again() -> None:
    with pytest.raises(ZeroDivisionError):
        first_failure(ExceptionGroup("all", [ChannelBroken("the peer went"), ZeroDivisionError()]))
