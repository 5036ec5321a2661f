"""What the source still has to send, and who says so: trackers, the hypervisor's log, page states, the digest audit.

Freshness (R13) is decided here. Where RAM itself is compared with what was sent, by a tracker that is told what that was or
by the audit's digests, this has to happen once the vCPUs are parked, and no manifest is sealed before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dirty import ComparingTracker, DirtyBitmap, collected
from ..errors import LocalProtocolError
from ..wire.handshake import Freshness
from .audit import Audited, PageDigests
from .sweep import TRACKER, Sweep, all_if_it_fails

if TYPE_CHECKING:
    from ..dirty import DirtyTracker
    from .export import Package
    from .memory import GuestMemory
    from .sweep import Looked


class PendingPages:
    """Pages of one session that are to be sent, `pages`: all of them to begin with.

    Called by one thread at a time, but for `record`, which several may call for different pages while nothing is collected.
    """

    def __init__(self, memory: GuestMemory, tracker: DirtyTracker | None, *, audit: bool) -> None:
        self.pages = DirtyBitmap.full(memory.pages)
        self._memory = memory
        self._tracker = tracker
        self._comparing = tracker if isinstance(tracker, ComparingTracker) else None
        self._digests = PageDigests(memory) if audit else None
        self._hinted = DirtyBitmap(memory.pages)
        self._found = DirtyBitmap(memory.pages)
        self._audited_pages = 0
        self._compared = self._comparing is None
        self._sweep = Sweep(tracker, memory.pages)

    @property
    def freshness(self) -> Freshness:
        """Who vouches for this guest's dirty pages."""
        if self._digests is not None or self._comparing is not None:
            return Freshness.DIGEST_AUDIT
        return Freshness.HOST_REPORTED if self._tracker is None else Freshness.SVSM_TRACKED

    @property
    def staged(self) -> bool:
        """Whether what is sealed has to be a private copy, as it is digested as well."""
        return self.freshness is Freshness.DIGEST_AUDIT

    @property
    def compared(self) -> bool:
        """Whether all of RAM was compared with what was sent since the park, as far as freshness rests on that."""
        return self._compared and (self._digests is None or self._audit_done())

    @property
    def is_collecting(self) -> bool:
        """Whether what was written is known in part only, so that nothing can be sent."""
        return self._sweep.is_open

    def require_collected(self) -> None:
        """Raise LocalProtocolError where what was written is known in part only."""
        self._sweep.require_closed()

    def start(self) -> None:
        """Begin to track. Raises GuestError where this machine cannot."""
        if self._tracker is not None:
            self._tracker.start()
        self._memory.find_holes()
        if self._comparing is not None:
            self._sweep.skip()  # all pages are pending: there is nothing to compare

    def stop(self) -> None:
        """Stop tracking."""
        if self._tracker is not None:
            self._tracker.stop()

    def hint(self, first_gfn: int, log: bytes) -> None:
        """Part of the hypervisor's dirty log; it counts from the next epoch on."""
        self._hinted.union_part(first_gfn, log)

    def collect_part(self) -> Looked:
        """The next step of taking in what was written since the last epoch began."""
        if self._comparing is not None and not self._sweep.is_open:
            self._memory.find_holes()  # which are compared as zero without being read
        return self._sweep.step(self.pages)

    def close(self, lost: DirtyBitmap, *, parked: bool) -> None:
        """All steps are done; take in what was hinted, found or `lost`, for an epoch to begin with."""
        self._sweep.close()
        # While it is open nobody is parked, so it began after the park as well.
        self._compared |= parked
        self._take_reports(lost)
        self._look_behind_reports()

    def collect_reports(self, lost: DirtyBitmap) -> None:
        """What came in since the epoch began, without reading RAM: a comparing tracker has done that after the park."""
        if self._tracker is not None and self._comparing is None:
            with all_if_it_fails(self.pages, 0, self._memory.pages):
                self.pages.union(collected(self._tracker, self._memory.pages, TRACKER))
        self._take_reports(lost)
        self._look_behind_reports()

    def record(self, package: Package) -> None:
        """A package is about to be sealed. Where it does not leave after all, its pages are pending again."""
        if self._digests is not None and not self._audit_done():
            self._digests.record(package.gfns, package.operations, package.payload)
        if self._comparing is not None:
            self._comparing.sent(package.gfns, package.copies, package.in_use)

    def settle(self) -> None:
        """An epoch ends: do what would be left for black-out."""
        if self._digests is not None:
            self._digests.settle()

    def audit(self, *, parked: bool) -> Audited:
        """The next step of the audit, or a trial of it. Raises LocalProtocolError where this session has none."""
        if self._digests is None:
            raise LocalProtocolError("this session has no audit")
        start = self._audited_pages
        stop = min(start + self._digests.step_pages, self._memory.pages)
        if not parked:
            self._digests.trial(stop)
            return Audited(stop, 0, more=False)
        found = self._digests.changed(start, stop, self.pages)
        # Not pending at once: a page of these may have been sent in this very epoch already (R1).
        self._found.set_gfns(found)
        self._audited_pages = stop
        return Audited(stop - start, len(found), more=not self._audit_done())

    def _look_behind_reports(self) -> None:
        """A page that is reported as written has memory behind it by now, and must not be taken for the hole that it was.

        After the reports: what is written later is reported for the next epoch.
        """
        if self._comparing is None:
            self._memory.find_holes()

    def _audit_done(self) -> bool:
        return self._audited_pages == self._memory.pages

    def _take_reports(self, lost: DirtyBitmap) -> None:
        self.pages.union(self._memory.take_state_changes())
        for bitmap in (self._hinted, self._found, lost):
            self.pages.union(bitmap.take())
