"""The one exception tree of pagexfer, and the coarse codes that may cross the trust border.

Both sides import this module and it imports nothing of ours. The trusted side raises detailed errors inside and
reports only a `RefusalCode` to the host: what exactly was wrong with a forged bundle is nobody's business outside.
"""

from __future__ import annotations

import enum


class RefusalCode(enum.IntEnum):
    """What the SVSM tells the host about a refused command. Numbers are wire numbers: never reused, 0 invalid."""

    COMMAND = 1  # unknown command, or one with bad arguments; nothing changed
    STATE = 2  # the command does not fit the session's state; nothing changed
    NOT_READY = 3  # a token was asked for too early: pages pending, or a vCPU not parked; nothing changed
    INTEGRITY = 4  # a bundle was malformed, forged, replayed or out of place; the session is over, keys wiped
    AUTHENTICATION = 5  # the peer did not prove what it must; nothing of the session is left
    GEOMETRY = 6  # the peer is authentic, but its guest has another RAM size, page size or vCPU count
    EXHAUSTED = 7  # a key reached its limit of bundles or bytes
    GUEST = 8  # the guest's own side (vCPU state, page states) refused, or it is another session's
    INTERNAL = 9  # a fault of the SVSM itself; the session is over
    POLICY = (
        10  # the peer proved who it is, and the policy does not accept it; nothing of the session is left
    )
    JOURNAL = 11  # a decision could not be written down, so it was not taken; the session cannot go on
    COMPRESSION = 12  # the peer is authentic, but would send compressed pages, which this side does not take


class PagexferError(Exception):
    """Root of every error that pagexfer raises on purpose."""


class LocalProtocolError(PagexferError):
    """The caller asked for something its own state does not allow; the state is unchanged."""


class NotReady(LocalProtocolError):
    """A token was asked for too early: a page is pending, a vCPU not parked or not exported; nothing changed."""


class RemoteProtocolError(PagexferError):
    """The peer did something that the protocol does not allow."""


class MalformedData(RemoteProtocolError):
    """Bytes from outside do not have the form that the specification gives. The only error `*_untrusted` parsers raise."""


class IntegrityError(RemoteProtocolError):
    """An authentication tag, a count or a digest does not match."""


class ReplayError(IntegrityError):
    """A counter, an epoch or a page number was seen before, or is not the next one."""


class ReflectionError(IntegrityError):
    """A bundle came back in the direction in which it was sent, or crossed to another channel or session."""


class LedgerRefused(IntegrityError):
    """A ledger is not the record of a guest's moves that it claims to be: `rule` does not hold at move `move`."""

    def __init__(self, rule: str, move: int, why: str) -> None:
        super().__init__(f"the ledger's rule {rule} refuses move {move}: {why}")
        self.rule = rule
        self.move = move


class KeyExhausted(PagexferError):
    """A key reached its limit of bundles or bytes and seals no more."""


class KeyPoisoned(PagexferError):
    """A key was wiped after a failure or at the end of its session."""


class AttestationError(RemoteProtocolError):
    """Evidence or key confirmation does not verify, or the policy does not accept what the evidence says."""


class PolicyRefused(AttestationError):
    """Evidence verifies, and the policy does not accept what it says."""


class GeometryError(RemoteProtocolError):
    """The peer is authentic, but its guest has another RAM size, page size or vCPU count."""


class CompressionRefused(RemoteProtocolError):
    """The peer is authentic, but would send compressed pages, and this side was not told to take them."""


class GateError(PagexferError):
    """A vCPU did not park, or its state cannot be saved or loaded."""


class PageStateError(PagexferError):
    """An access or a change that the RMP refuses: unvalidated page, second PVALIDATE, page out of range."""


class JournalError(PagexferError):
    """The journal cannot be written: what was to be recorded has not happened."""


class SvsmRefused(PagexferError):
    """The SVSM refused a command; seen from the host, which learns the coarse code and nothing else."""

    def __init__(self, code: RefusalCode, command: str) -> None:
        super().__init__(f"the SVSM refused {command}: {code.name}")
        self.code = code
        self.command = command


class SvsmLost(PagexferError):
    """The SVSM does not answer: its process ended, or it stands still. Whatever it was asked may have happened or not."""


class ChannelClosed(PagexferError):
    """We closed this connection ourselves."""


class ChannelBroken(PagexferError):
    """The peer or the network ended a connection, or it did not answer in time."""


class GuestError(PagexferError):
    """A guest cannot be made, started, stopped or restored on this machine; the message says why."""


class UsageError(PagexferError):
    """An argument or a file of the user cannot be used; the message says what is wrong and what to do."""


class Outcome(enum.IntEnum):
    """How a migration ended, as a process exit code."""

    COMPLETED = 0
    ENDED = 1  # not migrated; the guest goes on at the source
    USAGE = 2
    REFUSED = 3  # authentication or policy; the guest goes on at the source
    UNDECIDED = 4  # the start token left and no answer came: neither side's word alone says who runs


class TransferAborted(PagexferError):
    """The migration ended without success. `outcome` says who may run the guest, `reason` is machine readable.

    What is known of the `cause` on this side alone, such as a path or an error of the system, ends the message; the peer
    is told `coarse`, the message without it.
    """

    def __init__(self, outcome: Outcome, reason: str, message: str, cause: str = "") -> None:
        super().__init__(f"{message} ({cause})" if cause else message)
        self.outcome = outcome
        self.reason = reason
        self.coarse = message
