"""What each slot of a source and of a destination can be asked: the commands, and which call of the SVSM does them.

`shared` says whether the host can reach the slot's memory (`service.Border`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import LocalProtocolError, MalformedData
from ..wire.bundle import BundleKind, says_kind_untrusted
from ..wire.slot import Command, SlotStatus
from .service import Answer, BadCommand, SlotService

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..wire.slot import SlotMemory
    from .destination import DestinationSvsm
    from .service import Call
    from .source import SourceSvsm

# Pages of the smallest region that EPOCH counts; doubled until the counts fit a buffer.
_MIN_REGION_PAGES: Final = 128


def source_control(slot: SlotMemory, svsm: SourceSvsm, *, shared: bool = True) -> SlotService:
    """The session commands of a source."""

    def prepare(call: Call) -> Answer:
        room = call.room()
        return Answer(_store(svsm.prepare(call.argument), room))

    def setup(call: Call) -> Answer:
        room = call.room()
        return Answer(_store(svsm.establish(bytes(call.package())), room))

    def confirm(call: Call) -> Answer:
        svsm.confirm(bytes(call.package()))
        return Answer()

    def hint(call: Call) -> Answer:
        svsm.hint(call.argument, bytes(call.package()))
        return Answer()

    def epoch(call: Call) -> Answer:
        room = call.room()
        looked = svsm.collect_part()
        if looked.more:
            return Answer(result=looked.pages, status=SlotStatus.INCOMPLETE)
        pending = svsm.begin_epoch()
        region_pages = _MIN_REGION_PAGES
        while -(-pending.pages // region_pages) * 4 > len(room):
            region_pages *= 2
        counts = pending.region_counts(region_pages).astype("<u4", copy=False)
        return Answer(_store(counts.tobytes(), room), int(counts.sum()), region_pages)

    def audit(_call: Call) -> Answer:
        done = svsm.audit()
        return Answer(
            result=done.pages,
            result2=done.found,
            status=SlotStatus.INCOMPLETE if done.more else SlotStatus.OK,
        )

    def blackout(_call: Call) -> Answer:
        parked, vcpus = svsm.park()
        return Answer(
            result=parked,
            result2=vcpus,
            status=SlotStatus.OK if parked == vcpus else SlotStatus.INCOMPLETE,
        )

    def finish(_call: Call) -> Answer:
        svsm.finish()
        return Answer()

    def abort(_call: Call) -> Answer:
        svsm.abort()
        return Answer()

    return SlotService(
        slot,
        svsm,
        {
            Command.PREPARE: prepare,
            Command.SETUP: setup,
            Command.CONFIRM: confirm,
            Command.HINT: hint,
            Command.EPOCH: epoch,
            Command.AUDIT: audit,
            Command.BLACKOUT: blackout,
            Command.FINISH: finish,
            Command.ABORT: abort,
        },
        shared=shared,
    )


def source_channel(slot: SlotMemory, svsm: SourceSvsm, channel: int, *, shared: bool = True) -> SlotService:
    """The commands of a source's channel slot; states, tokens and answers go over channel 0's alone."""

    def setup(call: Call) -> Answer:
        return Answer(svsm.open_channel(channel, call.room()))

    def replace(call: Call) -> Answer:
        if not call.has_package:
            return Answer(svsm.replace_channel(channel, call.room()))
        done = svsm.channel_replaced(channel, call.package())
        return Answer(result=done.pages, result2=done.token | done.ledger << 1)

    def export(call: Call) -> Answer:
        start = call.argument
        done = svsm.export(channel, start, start + call.registers.argument2, call.room())
        status = SlotStatus.INCOMPLETE if done.more else SlotStatus.OK
        return Answer(done.length, done.pages, done.zero_pages, status)

    def state(call: Call) -> Answer:
        if not call.has_package:
            return Answer(svsm.export_vcpu(call.argument, call.room()))
        try:
            return Answer(svsm.carry_untrusted(call.package(), call.room()))
        except MalformedData as error:
            raise BadCommand(str(error)) from None

    def token(call: Call) -> Answer:
        seal = tokens.get(call.argument)
        if seal is None:
            raise BadCommand("no token of a source")
        return Answer(seal(call.room()))

    def accept(call: Call) -> Answer:
        with svsm.lock:
            return Answer(result=svsm.accept_untrusted(call.package()))

    tokens: dict[int, Callable[[memoryview], int]] = {
        BundleKind.LEDGER: svsm.ledger,
        BundleKind.EPOCH_TOKEN: svsm.epoch_token,
        BundleKind.MANIFEST: svsm.manifest,
        BundleKind.START_TOKEN: svsm.start_token,
    }
    commands: dict[Command, Callable[[Call], Answer]] = {
        Command.SETUP: setup,
        Command.REPLACE: replace,
        Command.EXPORT: export,
    }
    if channel == 0:
        commands |= {Command.STATE: state, Command.TOKEN: token, Command.IMPORT: accept}
    return SlotService(slot, svsm, commands, shared=shared)


def destination_control(slot: SlotMemory, svsm: DestinationSvsm, *, shared: bool = True) -> SlotService:
    """The session commands of a destination; the argument of PREPARE, SETUP and, if not 0, ABORT names the attempt."""

    def prepare(call: Call) -> Answer:
        room = call.room()
        return Answer(_store(svsm.answer(call.argument, bytes(call.package())), room))

    def setup(call: Call) -> Answer:
        room = call.room()
        established = svsm.establish(call.argument, bytes(call.package()))
        return Answer(_store(established, room), svsm.channels, svsm.freshness)

    def replace(call: Call) -> Answer:
        if not call.has_package:
            return Answer(svsm.replace_channel(call.argument, call.room()))
        svsm.check_replacement_untrusted(call.argument, call.package())
        return Answer()

    def finish(_call: Call) -> Answer:
        svsm.finish()
        return Answer()

    def abort(call: Call) -> Answer:
        if call.argument:
            svsm.forget(call.argument)
        else:
            svsm.fail()
        return Answer()

    return SlotService(
        slot,
        svsm,
        {
            Command.PREPARE: prepare,
            Command.SETUP: setup,
            Command.REPLACE: replace,
            Command.FINISH: finish,
            Command.ABORT: abort,
        },
        shared=shared,
    )


def destination_channel(
    slot: SlotMemory, svsm: DestinationSvsm, channel: int, *, shared: bool = True
) -> SlotService:
    """The commands of a destination's channel slot; answers leave over channel 0's alone."""

    def setup(call: Call) -> Answer:
        svsm.open_channel_untrusted(channel, call.package())
        return Answer()

    def import_bundle(call: Call) -> Answer:
        package = call.package()
        # Before anything is opened: where no buffer is free, nothing changes.
        room = call.room() if says_kind_untrusted(package) == BundleKind.DEVICE_STATE else None
        done = svsm.import_untrusted(channel, package)
        given_out = 0 if room is None else _store(done.device_state, room)
        return Answer(given_out, done.kind, done.pages << 32 | done.zero_pages)

    def token(call: Call) -> Answer:
        if call.argument not in BundleKind.__members__.values():
            raise BadCommand("no token of a destination")
        return Answer(svsm.seal_answer(BundleKind(call.argument), call.room()))

    commands: dict[Command, Callable[[Call], Answer]] = {
        Command.SETUP: setup,
        Command.IMPORT: import_bundle,
    }
    if channel == 0:
        commands[Command.TOKEN] = token
    return SlotService(slot, svsm, commands, shared=shared)


def _store(data: bytes, room: memoryview) -> int:
    if len(data) > len(room):
        raise LocalProtocolError("the slot's buffers are too small for this answer")
    room[: len(data)] = data
    return len(data)
