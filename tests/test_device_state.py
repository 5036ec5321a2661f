"""The hypervisor's device state on its way: sealed, whole, in order, and taken for nothing of the guest's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
import trio

from pagexfer.migration import receive_guest, send_guest
from pagexfer.testing.proxy import FaultProxy

from .engine_guests import SmallMachine
from .loopback import HOST
from .small_guests import ATTESTOR

if TYPE_CHECKING:
    from pagexfer.testing.proxy import Frame

_MIB: Final = 1 << 20


async def _move(machine: SmallMachine, *, isolated: bool = False) -> list[Frame]:
    """Move a small guest; returns every frame that crossed between the two sides."""
    crossed: list[Frame] = []

    def see(frame: Frame) -> bool:
        crossed.append(frame)
        return False

    async def receive(task_status: trio.TaskStatus[int]) -> None:
        await receive_guest(
            machine.destination, HOST, 0, ATTESTOR, isolated=isolated, on_listening=task_status.started
        )

    with trio.fail_after(30):
        async with trio.open_nursery() as network, trio.open_nursery() as sides:
            port = await sides.start(receive)
            proxy_port = await network.start(FaultProxy(HOST, port, see).serve)
            await send_guest(machine.source, HOST, proxy_port, ATTESTOR, channels=2, isolated=isolated)
            network.cancel_scope.cancel()
    return crossed


@pytest.mark.parametrize("isolated", [False, True])
async def test_no_byte_of_it_crosses_in_clear(isolated: bool) -> None:
    marker = os.urandom(32)
    machine = SmallMachine()
    machine.source.hypervisor.device_state = marker * (3 * _MIB // len(marker)) + marker
    crossed = await _move(machine, isolated=isolated)
    assert machine.moved()
    assert machine.destination.hypervisor.loaded == machine.source.hypervisor.device_state
    assert sum(len(frame.data) for frame in crossed) > 3 * _MIB
    assert not any(marker[:8] in frame.data for frame in crossed)
