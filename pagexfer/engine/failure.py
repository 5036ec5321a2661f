"""From whatever went wrong in a nursery to the one error that the user sees."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ..errors import (
    ChannelBroken,
    ChannelClosed,
    GuestError,
    MalformedData,
    Outcome,
    PagexferError,
    RefusalCode,
    SvsmLost,
    SvsmRefused,
    TransferAborted,
)
from ..wire.constants import PAGE_SIZE
from ..wire.control import Failed
from ..wire.handshake import parse_hello_untrusted, split_reply_untrusted
from .hypervisor import WatchedHypervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

    from .control import Control
    from .hypervisor import Hypervisor

Value = TypeVar("Value")

_LOG: Final = logging.getLogger("pagexfer")
_FAREWELL_TIMEOUT_S: Final = 2.0
# As long as a monitor takes to stop a machine or to save its devices on a busy host.
HYPERVISOR_TIMEOUT_S: Final = 30.0
# What a side saw itself says less than the words that the peer has sent, or has left on the control connection.
SECOND_HAND: Final = ("connection", "destination-failed")

# What a source may have to undo at its hypervisor, by the names of the monitor's calls.
RESUME: Final = "resume"
STOP_LOG: Final = "stop_dirty_log"
THROTTLE: Final = "throttle"

# What it says of each that could not be undone.
_REMAINS: Final = {
    RESUME: "and the guest does not go on here",
    THROTTLE: "and the guest may stay slowed down",
    STOP_LOG: "and the hypervisor may keep its dirty log on",
}

# For each coarse code: the machine-readable reason and what to tell a person.
_REFUSALS: Final = {
    RefusalCode.COMMAND: ("internal", "the SVSM does not know a command of this engine"),
    RefusalCode.STATE: ("internal", "a command came in the wrong state"),
    RefusalCode.NOT_READY: ("not-ready", "a token was asked for while pages were pending, or a vCPU ran"),
    RefusalCode.INTEGRITY: ("integrity", "received data was forged, damaged, replayed or incomplete"),
    RefusalCode.AUTHENTICATION: (
        "authentication",
        "one side did not prove who it is: both need the same kind of attestation, and the same pre-shared key or roots",
    ),
    RefusalCode.POLICY: (
        "policy",
        "one side proved who it is, and the other side's policy does not accept it",
    ),
    RefusalCode.GEOMETRY: ("geometry", "source and destination guests differ in RAM size or number of vCPUs"),
    RefusalCode.COMPRESSION: (
        "compression",
        "the source would compress pages, and the destination was not told to accept that (--accept-compression)",
    ),
    RefusalCode.EXHAUSTED: ("key-exhausted", "a channel's key reached its limit: use more channels"),
    RefusalCode.GUEST: (
        "guest",
        "a vCPU, a page or its state was refused: both sides need the same kind of guest, the destination room for RAM",
    ),
    RefusalCode.INTERNAL: ("internal", "internal fault of the SVSM"),
    RefusalCode.JOURNAL: (
        "journal",
        "the journal or the ledger could not be written: look at its disk and its folder",
    ),
}


class HypervisorFailed(GuestError):
    """The hypervisor's own code raised what is not of pagexfer: the `__cause__`."""


def first_failure(error: BaseException) -> PagexferError | None:
    """The error of ours that explains `error`, or None where it only says that we were cancelled.

    A nursery reports all that failed at once; what was only a consequence of closing is not the reason. Anything that is
    not ours is a defect and is raised again.
    """
    failures = list(_leaves(error))
    ours = [failure for failure in failures if isinstance(failure, PagexferError)]
    foreign = [failure for failure in failures if not isinstance(failure, PagexferError | trio.Cancelled)]
    if foreign:
        raise foreign[0]
    return min(ours, key=_rank, default=None)


def cause_of(failure: PagexferError | None, error: BaseException) -> BaseException:
    """What brought `failure` about: what the embedding program's own code raised, or else `error`, all that was seen."""
    cause = failure.__cause__ if failure is not None else None
    while isinstance(cause, PagexferError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return cause or error


def foreign_cause(failure: PagexferError) -> str:
    """What the hypervisor raised that is not ours, in a line for this side alone; empty where it raised nothing so."""
    return described(failure.__cause__) if isinstance(failure, HypervisorFailed) and failure.__cause__ else ""


def described(error: BaseException) -> str:
    """An error that is not ours in one line: the first one of a group."""
    first = _leaves(error)[0]
    return one_line(f"{type(first).__name__}: {first}")


def with_cause(failure: PagexferError) -> str:
    """A failure and its foreign cause, in a line for this side alone."""
    cause = foreign_cause(failure)
    return f"{failure} ({cause})" if cause else str(failure)


def svsm_lost(refusal: PagexferError | None) -> SvsmLost | None:
    """Why an engine was cancelled that nobody cancelled: its SVSM, which does not even take ABORT any more, is gone."""
    return refusal if isinstance(refusal, SvsmLost) else None


def as_aborted(failure: PagexferError) -> TransferAborted:
    """The failure with its outcome, reason and one clear line."""
    match failure:
        case TransferAborted():
            return failure
        case SvsmRefused():
            reason, message = _REFUSALS[failure.code]
            refused = failure.code in (RefusalCode.AUTHENTICATION, RefusalCode.POLICY)
            return TransferAborted(Outcome.REFUSED if refused else Outcome.ENDED, reason, message)
        case ChannelBroken() | ChannelClosed():
            return TransferAborted(Outcome.ENDED, "connection", str(failure))
        case MalformedData():
            return TransferAborted(Outcome.ENDED, "protocol", f"the peer broke the protocol: {failure}")
        case GuestError():
            return TransferAborted(Outcome.ENDED, "guest", str(failure), foreign_cause(failure))
        case SvsmLost():
            return TransferAborted(Outcome.ENDED, "svsm", str(failure))
        case _:
            return TransferAborted(Outcome.ENDED, "internal", str(failure))


def undecided(cause: TransferAborted) -> TransferAborted:
    """What a source says that lost its destination after the start token left."""
    return TransferAborted(
        Outcome.UNDECIDED,
        "undecided",
        "the start token left and the destination did not confirm that the guest runs there: the guest stays parked here; "
        f"ask the destination before you do anything with it ({cause})",
    )


@contextmanager
def hypervisor_call(what: str) -> Iterator[None]:
    """Around a call of the hypervisor, which a guest may wait for. Raises GuestError where it fails or takes too long."""
    try:
        with trio.fail_after(HYPERVISOR_TIMEOUT_S), hypervisors_own(what):
            yield
    except trio.TooSlowError:
        raise GuestError(f"the hypervisor did not {what} within {HYPERVISOR_TIMEOUT_S:g} s") from None


async def hypervisor_thread(what: str, call: Callable[[], Value]) -> Value:
    """As `hypervisor_call`, for a call that takes a thread: those of a dirty log do.

    A cancel waits for it, so that no other call comes beside it. One that takes too long is left to itself.
    """
    with trio.CancelScope(shield=True), hypervisor_call(what):
        value = await trio.to_thread.run_sync(call, abandon_on_cancel=True)
    return value  # noqa: RET504 (to mypy, a scope may swallow what ends its block)


async def let_go_on(
    hypervisor: Hypervisor, lift_throttle: Callable[[], Awaitable[None]], left: Collection[str]
) -> dict[str, PagexferError]:
    """Undo at a source what this session had its hypervisor do, as far as it can be. Returns what was not undone, and why.

    `left` names what is to be done: RESUME, STOP_LOG. A guest that this session did not stop may stand still for a
    reason of its own.
    """
    log, failed = hypervisor.dirty_log, dict[str, PagexferError]()

    async def resume() -> None:
        with hypervisor_call("continue the guest"):
            await hypervisor.resume()

    async def stop_log() -> None:
        if log is not None:
            await hypervisor_thread("stop its dirty log", log.stop)

    for name, undo in ((RESUME, resume), (THROTTLE, lift_throttle), (STOP_LOG, stop_log)):
        if name in left or name == THROTTLE:  # which knows by itself whether there is one
            try:
                await undo()
            except PagexferError as error:
                failed[name] = error
    return failed


def is_disturbed(hypervisor: Hypervisor, error: BaseException) -> bool:
    """Whether a watched machine's own trouble ended the move: its `resume` leaves it so, and says if it stands still."""
    return isinstance(hypervisor, WatchedHypervisor) and any(
        isinstance(leaf, GuestError) or (isinstance(leaf, TransferAborted) and leaf.reason == "guest")
        for leaf in _leaves(error)
    )


def not_undone(aborted: TransferAborted, failed: Mapping[str, PagexferError]) -> TransferAborted:
    """`aborted` where the source is not as it was: its guest may stand still. An isolated engine may have said that too."""
    line = str(aborted)
    news = [
        f"{remains}: {with_cause(failed[name])}"
        for name, remains in _REMAINS.items()
        if name in failed and remains not in line
    ]
    return TransferAborted(aborted.outcome, aborted.reason, "; ".join([line, *news])) if news else aborted


def stuck_at_destination(why: PagexferError) -> TransferAborted:
    """What a destination says whose SVSM has released the guest, which the hypervisor does not run."""
    return TransferAborted(
        Outcome.UNDECIDED, "undecided", f"the guest was released here but does not run: {with_cause(why)}"
    )


@contextmanager
def hypervisors_own(what: str) -> Iterator[None]:
    """Around what is the hypervisor's code and not ours: whatever it raises is its failure, and raised from as GuestError.

    Errors of ours pass as they are, and so do a cancel and what ends the program.
    """
    try:
        yield
    except Exception as error:
        if all(isinstance(leaf, PagexferError) for leaf in _leaves(error)):
            raise
        raise HypervisorFailed(f"the hypervisor did not {what}") from error


async def watch(hypervisor: WatchedHypervisor) -> None:
    """For ever. Raises GuestError once others stop, continue or end the machine, or the hypervisor cannot watch it."""
    with hypervisors_own("watch the guest"):
        await hypervisor.watch()


def call_back(callback: Callable[[Value], None], value: Value) -> None:
    """Tell the embedding program something. What it raises ends the migration, as TransferAborted."""
    try:
        callback(value)
    except Exception as error:
        raise TransferAborted(
            Outcome.ENDED, "callback", "a callback of the program that migrates failed", described(error)
        ) from error


def call_back_at_the_end(callback: Callable[[Value], None], value: Value) -> None:
    """Tell it something when the outcome is there already: what it raises then is logged and changes nothing."""
    try:
        callback(value)
    except Exception:
        _LOG.exception(
            "a callback failed, which changes nothing as the outcome of the migration was there before"
        )


def unfit(source_hello: bytes, reply: bytes) -> TransferAborted:
    """What differs between two guests that cannot be one; both hellos were accepted before."""
    source, (packed, _) = parse_hello_untrusted(source_hello), split_reply_untrusted(reply)
    destination = parse_hello_untrusted(packed)
    if source.ram_pages != destination.ram_pages:
        sizes = [f"{hello.ram_pages * PAGE_SIZE / 2**20:g} MiB" for hello in (source, destination)]
        difference = f"the source's guest has {sizes[0]} of RAM, the destination's {sizes[1]}"
    else:
        difference = f"the source's guest has {source.vcpus} vCPUs, the destination's {destination.vcpus}"
    return TransferAborted(Outcome.ENDED, "geometry", f"{difference}: give both sides the same")


def one_line(text: str) -> str:
    """What another process or machine says, as a terminal may show it."""
    return "".join(character if character.isprintable() else " " for character in text)[:500]


async def say_farewell(control: Control, failure: TransferAborted) -> None:
    """Tell the peer why this side ends, as far as the connection still carries it.

    Anybody on the way can read that line, and the peer shows it as this side's: so it is coarse.
    """
    with trio.move_on_after(_FAREWELL_TIMEOUT_S):
        try:
            await control.send(Failed(failure.reason, one_line(failure.coarse)))
        except (ChannelBroken, ChannelClosed):
            return


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]


def _rank(failure: PagexferError) -> int:
    """Lower explains more: what a side said, then what was refused, then what only broke."""
    match failure:
        case TransferAborted() if failure.reason not in SECOND_HAND:
            return 0
        case SvsmRefused() if failure.code is not RefusalCode.STATE:
            return 1
        case SvsmRefused():
            # Another channel's bundle was refused, and ended the session, while this one's was on its way to the SVSM.
            return 2
        case ChannelClosed():
            return 5
        case ChannelBroken() | TransferAborted():
            return 4
        case _:
            return 3
