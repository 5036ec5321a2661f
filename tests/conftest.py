"""What all tests share: how hypothesis runs, and which guests this machine can have."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

from pagexfer.guests import kvm
from pagexfer.guests.kvm import KvmGuest
from pagexfer.guests.simulated import SimulatedGuest

# Machines are shared: a deadline for each example would test the neighbours. In CI every run tries the same examples.
hypothesis.settings.register_profile(
    "pagexfer", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True
)
hypothesis.settings.load_profile("pagexfer")


# A shell's background job ignores an interrupt, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["kvm", "simulated"])
def guest_type(request: pytest.FixtureRequest) -> type[KvmGuest] | type[SimulatedGuest]:
    """Each kind of guest that this machine can run."""
    if request.param == "simulated":
        return SimulatedGuest
    reason = kvm.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return KvmGuest
