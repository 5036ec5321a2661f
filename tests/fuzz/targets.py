"""What is fuzzed: each target takes any bytes and raises only where a parser does something that it must not do.

A parser of hostile bytes either returns a value or raises MalformedData. Where the value can be packed again, that gives
back the bytes that were parsed: nothing in them was overlooked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pagexfer.attestation.snp import parse_endorsements_untrusted
from pagexfer.attestation.snp.certificates import _load_untrusted, parse_crls_untrusted
from pagexfer.attestation.snp.framing import pack_evidence, parse_evidence_untrusted
from pagexfer.attestation.snp.leaf import parse_leaf_untrusted
from pagexfer.attestation.snp.product import parse_tcb_untrusted
from pagexfer.attestation.snp.report import parse_report_untrusted
from pagexfer.attestation.snp.table import parse_certificate_table_untrusted
from pagexfer.engine.progress import MigrationInfo
from pagexfer.engine.steering import MigrationParameters
from pagexfer.errors import LedgerRefused, MalformedData
from pagexfer.guests.kvm import state as kvm_state
from pagexfer.guests.kvm.hypervisor import parse_device_state_untrusted
from pagexfer.guests.qemu.device_state import split_state_untrusted
from pagexfer.guests.qemu.messages import parse_message_untrusted
from pagexfer.guests.simulated_vcpu.registers import parse_registers_untrusted
from pagexfer.svsm.compression import Decompressor
from pagexfer.svsm.device_state import Carried
from pagexfer.svsm.hand_over import pack_vcpu, parse_vcpu_untrusted
from pagexfer.svsm.ledger import read_terms_untrusted
from pagexfer.wire.bundle import (
    DATA,
    HEADER_BYTES,
    PAGE_KINDS,
    BundleKind,
    pack_entries,
    parse_entries_untrusted,
    parse_header_untrusted,
    says_kind_untrusted,
)
from pagexfer.wire.constants import MAX_BUNDLE_DATA_PAGES, PAGE_SIZE
from pagexfer.wire.control import pack_control, parse_control_untrusted
from pagexfer.wire.device_state import PART_HEADER_BYTES, parse_device_part_untrusted
from pagexfer.wire.framing import (
    pack_barrier,
    parse_barrier_untrusted,
    parse_connection_hello_untrusted,
    parse_frame_header_untrusted,
)
from pagexfer.wire.handshake import (
    pack_established,
    parse_established_untrusted,
    parse_hello_untrusted,
    split_proof_untrusted,
    split_reply_untrusted,
)
from pagexfer.wire.journal import parse_journal_untrusted
from pagexfer.wire.ledger import pack_ledger, parse_body_untrusted, parse_ledger_untrusted
from pagexfer.wire.monitor import (
    HEAD_BYTES,
    as_fields,
    from_fields_untrusted,
    parse_fields_untrusted,
    parse_head_untrusted,
)
from pagexfer.wire.slot import (
    COMMAND_OFFSET,
    IDENTITY_OFFSET,
    REGISTER_PAGE_BYTES,
    STATUS_OFFSET,
    SlotGeometry,
    SlotMemory,
    parse_identity_untrusted,
)
from pagexfer.wire.token import (
    pack_records,
    pack_start,
    parse_epoch_totals_untrusted,
    parse_manifest_untrusted,
    parse_records_untrusted,
    split_start_untrusted,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_LINE_BYTES: Final = 64
_RAM_PAGES: Final = 65536
_MAX_FORMATTED_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """`parsers` are the functions that `check` gives any bytes to."""

    name: str
    parsers: tuple[Callable[..., object], ...]
    check: Callable[[bytes], None]

    def run(self, data: bytes) -> bool:
        """Whether the bytes were taken. Raises where the parser fails in any way but the documented one."""
        try:
            self.check(data)
        except MalformedData:
            return False
        return True


def _frame_header(data: bytes) -> None:
    assert parse_frame_header_untrusted(data).pack() == data


def _connection_hello(data: bytes) -> None:
    assert parse_connection_hello_untrusted(data).pack() == data


def _barrier(data: bytes) -> None:
    assert pack_barrier(parse_barrier_untrusted(data)) == data


def _control(data: bytes) -> None:
    message = parse_control_untrusted(data)  # msgpack has several codings of one value
    assert parse_control_untrusted(pack_control(message)) == message


def _hello(data: bytes) -> None:
    assert parse_hello_untrusted(data).pack() == data


def _reply(data: bytes) -> None:
    assert b"".join(split_reply_untrusted(data)) == data


def _proof(data: bytes) -> None:
    assert b"".join(split_proof_untrusted(data)) == data


def _end(data: bytes) -> None:
    assert pack_established(*parse_established_untrusted(data)) == data


def _bundle(data: bytes) -> None:
    said = says_kind_untrusted(data)
    header = parse_header_untrusted(data, len(data))
    assert header.kind == said
    assert header.pack() == data[:HEADER_BYTES]
    if header.kind in PAGE_KINDS:
        raw = data[HEADER_BYTES : header.aad_bytes]
        assert pack_entries(*parse_entries_untrusted(raw, header, _RAM_PAGES)) == raw


def _frame(data: bytes) -> None:
    """Two bytes say how many pages the entries in front of the frame count, which are never more than 512."""
    pages = int.from_bytes(data[:2], "little") % MAX_BUNDLE_DATA_PAGES + 1
    operations = np.full(pages, DATA, dtype=np.uint8)
    content = Decompressor().content_untrusted(BundleKind.PAGES_ZSTD, memoryview(data)[2:], operations)
    assert len(content) == pages * PAGE_SIZE


def _epoch_totals(data: bytes) -> None:
    assert parse_epoch_totals_untrusted(data).pack() == data


def _manifest(data: bytes) -> None:
    assert parse_manifest_untrusted(data).pack() == data


def _vcpu_payload(data: bytes) -> None:
    assert pack_vcpu(*parse_vcpu_untrusted(data)) == data


def _device_part(data: bytes) -> None:
    part = parse_device_part_untrusted(data)
    assert part.pack_header() == data[:PART_HEADER_BYTES]
    assert Carried(part.total_bytes, part.offset).after_untrusted(data) == (part.total_bytes, part.end)


def _records(data: bytes) -> None:
    assert pack_records(parse_records_untrusted(data)) == data


def _monitor(data: bytes) -> None:
    text_bytes, _ = parse_head_untrusted(data[:HEAD_BYTES])
    fields = parse_fields_untrusted(data[HEAD_BYTES : HEAD_BYTES + text_bytes])
    for name, kind in (("info", MigrationInfo), ("parameters", MigrationParameters)):
        if name in fields:
            record = from_fields_untrusted(kind, fields[name])
            assert from_fields_untrusted(kind, as_fields(record)) == record or data.count(b"NaN")


def _start(data: bytes) -> None:
    assert pack_start(*split_start_untrusted(data)) == data


def _journal(data: bytes) -> None:
    assert parse_journal_untrusted(data).pack() == data


def _ledger(data: bytes) -> None:
    records = parse_ledger_untrusted(data)
    assert pack_ledger(records) == data
    for record in records:
        assert parse_body_untrusted(record.body.pack()) == record.body
        try:
            read_terms_untrusted(record.proofs)
        except LedgerRefused:
            return


def _identity(data: bytes) -> None:
    page = data[:_LINE_BYTES].ljust(REGISTER_PAGE_BYTES, b"\0")
    geometry = parse_identity_untrusted(page)
    if geometry.slot_bytes <= _MAX_FORMATTED_BYTES:
        memory = bytearray(geometry.slot_bytes)
        SlotMemory.format(memory, geometry)
        assert memory[IDENTITY_OFFSET : IDENTITY_OFFSET + _LINE_BYTES] == page[:_LINE_BYTES]


def _command(data: bytes) -> None:
    raw, slot = _slot_with(COMMAND_OFFSET, data)
    registers = slot.read_command_untrusted()
    slot.write_command(*registers)
    assert raw[COMMAND_OFFSET : COMMAND_OFFSET + _LINE_BYTES] == _line(data)


def _status(data: bytes) -> None:
    raw, slot = _slot_with(STATUS_OFFSET, data)
    registers = slot.read_status_untrusted()
    slot.write_status(*registers)
    assert raw[STATUS_OFFSET : STATUS_OFFSET + _LINE_BYTES] == _line(data)


def _slot_with(offset: int, data: bytes) -> tuple[bytearray, SlotMemory]:
    geometry = SlotGeometry(0, 2, 1 << 16)
    raw = bytearray(geometry.slot_bytes)
    slot = SlotMemory.format(raw, geometry)
    raw[offset : offset + _LINE_BYTES] = _line(data)
    return raw, slot


def _line(data: bytes) -> bytes:
    return data[:_LINE_BYTES].ljust(_LINE_BYTES, b"\0")


def _tcb(data: bytes) -> None:
    tcb = parse_tcb_untrusted(data[1:], data[0] if data else 0)
    assert str(tcb)


def _report(data: bytes) -> None:
    assert data.endswith(parse_report_untrusted(data).raw)


def _evidence(data: bytes) -> None:
    assert pack_evidence(parse_evidence_untrusted(data)) == data


def _certificate_table(data: bytes) -> None:
    parse_certificate_table_untrusted(data)


def _endorsements(data: bytes) -> None:
    """The parts are divided by a mark that no DER or PEM has any use for."""
    leaf, _, rest = data.partition(b"\0--\0")
    chain, _, crl = rest.partition(b"\0--\0")
    parse_leaf_untrusted(parse_endorsements_untrusted(leaf, chain, crl or None).leaf)


def _leaf(data: bytes) -> None:
    for certificate in _load_untrusted(data, "the file"):
        parse_leaf_untrusted(certificate)


def _kvm_state(data: bytes) -> None:
    assert kvm_state.encode(kvm_state.parse_untrusted(data)) == data


def _device_state(data: bytes) -> None:
    parse_device_state_untrusted(data)


def _qemu_state(data: bytes) -> None:
    platform, stream = split_state_untrusted(data)
    assert platform.pack() + stream == data


def _qmp_message(data: bytes) -> None:
    parse_message_untrusted(data)


def _registers(data: bytes) -> None:
    assert parse_registers_untrusted(data).to_bytes() == data


TARGETS: Final = (
    Target("frame-header", (parse_frame_header_untrusted,), _frame_header),
    Target("connection-hello", (parse_connection_hello_untrusted,), _connection_hello),
    Target("barrier", (parse_barrier_untrusted,), _barrier),
    Target("control", (parse_control_untrusted,), _control),
    Target("hello", (parse_hello_untrusted,), _hello),
    Target("reply", (split_reply_untrusted,), _reply),
    Target("proof", (split_proof_untrusted,), _proof),
    Target("end", (parse_established_untrusted,), _end),
    Target("bundle", (parse_header_untrusted, parse_entries_untrusted, says_kind_untrusted), _bundle),
    Target("compressed-pages", (Decompressor.content_untrusted, Decompressor.decompress_untrusted), _frame),
    Target("epoch-totals", (parse_epoch_totals_untrusted,), _epoch_totals),
    Target("manifest", (parse_manifest_untrusted,), _manifest),
    Target("vcpu-payload", (parse_vcpu_untrusted,), _vcpu_payload),
    Target("device-part", (parse_device_part_untrusted, Carried.after_untrusted), _device_part),
    Target("channel-records", (parse_records_untrusted,), _records),
    Target(
        "monitor-message", (parse_head_untrusted, parse_fields_untrusted, from_fields_untrusted), _monitor
    ),
    Target("start-token", (split_start_untrusted,), _start),
    Target("journal", (parse_journal_untrusted,), _journal),
    Target("ledger", (parse_ledger_untrusted, parse_body_untrusted, read_terms_untrusted), _ledger),
    Target("slot-identity", (parse_identity_untrusted,), _identity),
    Target("slot-command", (SlotMemory.read_command_untrusted,), _command),
    Target("slot-status", (SlotMemory.read_status_untrusted,), _status),
    Target("snp-tcb", (parse_tcb_untrusted,), _tcb),
    Target("snp-report", (parse_report_untrusted,), _report),
    Target("snp-evidence", (parse_evidence_untrusted,), _evidence),
    Target("snp-table", (parse_certificate_table_untrusted,), _certificate_table),
    Target("snp-endorsements", (parse_endorsements_untrusted, parse_crls_untrusted), _endorsements),
    Target("snp-leaf", (parse_leaf_untrusted,), _leaf),
    Target("kvm-vcpu", (kvm_state.parse_untrusted,), _kvm_state),
    Target("kvm-device", (parse_device_state_untrusted,), _device_state),
    Target("qemu-state", (split_state_untrusted,), _qemu_state),
    Target("qmp-message", (parse_message_untrusted,), _qmp_message),
    Target("simulated-vcpu", (parse_registers_untrusted,), _registers),
)
