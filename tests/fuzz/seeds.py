"""Where each target begins: the fixed vectors, good and bad, and the real attestation data where this machine has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pagexfer.attestation.snp import Evidence
from pagexfer.attestation.snp.framing import pack_evidence
from pagexfer.engine.progress import Progress
from pagexfer.engine.steering import MigrationParameters
from pagexfer.guests.kvm import hypervisor, ioctls
from pagexfer.guests.kvm import state as kvm_state
from pagexfer.guests.pattern import Layout
from pagexfer.guests.qemu.device_state import Platform
from pagexfer.guests.simulated_vcpu.registers import Registers
from pagexfer.wire.monitor import as_fields, pack_message
from pagexfer.wire.slot import COMMAND_OFFSET, STATUS_OFFSET

from ..snp_data import DATA, NAMES, REAL, chain, leaf, report
from ..wire_vectors import data_of, load

if TYPE_CHECKING:
    from .targets import Target

# Lists of vectors by target: file, names of the lists in it.
_VECTORS: Final = {
    "frame-header": ("framing", "headers", "refused_headers"),
    "connection-hello": ("framing", "connection_hellos", "refused_connection_hellos"),
    "barrier": ("framing", "barriers", "refused_barriers"),
    "control": ("control", "messages", "refused"),
    "hello": ("handshake", "hellos", "refused_hellos"),
    "reply": ("handshake", "replies", "refused_replies"),
    "proof": ("handshake", "proofs", "refused_proofs"),
    "end": ("handshake", "ends", "refused_ends"),
    "journal": ("journal", "records", "records_with_a_process", "refused_records"),
    "ledger": ("ledger", "ledgers", "refused_ledgers"),
    "bundle": ("bundles", "bundles", "refused_headers"),
    "device-part": ("bundles", "device_parts", "refused_device_parts"),
    "epoch-totals": ("tokens", "epoch_totals", "refused_epoch_totals"),
    "manifest": ("tokens", "manifests", "refused_manifests"),
    "slot-identity": ("slot", "identities", "refused_identities"),
    "slot-command": ("slot", "commands", "refused_commands"),
    "slot-status": ("slot", "statuses", "refused_statuses"),
}

# The vectors of these are whole register pages, of which the targets fuzz one line of 64 bytes.
_LINES: Final = {"slot-command": COMMAND_OFFSET, "slot-status": STATUS_OFFSET}


def seeds_of(target: Target) -> list[bytes]:
    """At least one each; the attestation data is empty where there is none on this machine."""
    if target.name in _VECTORS:
        file, *lists = _VECTORS[target.name]
        vectors = load(file)
        start = _LINES.get(target.name, 0)
        end = start + 64 if target.name in _LINES else None
        return [data_of(vector)[start:end] for name in lists for vector in vectors[name]]
    info = Progress(1 << 20, 0.0).info(1.0)
    own = {
        "compressed-pages": [
            (vector["pages"] - 1).to_bytes(2, "little") + data_of(vector)
            for name in ("frames", "refused_frames")
            for vector in load("frames")[name]
        ],
        "vcpu-payload": [bytes(5), bytes(4) + bytes(range(256))],
        "channel-records": [b"", bytes(range(60)), bytes(range(120))],
        "monitor-message": [
            pack_message({"kind": "call", "parameters": as_fields(MigrationParameters())}),
            pack_message({"kind": "info", "info": as_fields(info)}, b"payload"),
        ],
        "start-token": [data_of(vector) + bytes(64) for vector in load("tokens")["manifests"]],
        "snp-evidence": [pack_evidence(Evidence(bytes(1184), table)) for table in (b"", bytes(24))],
        "snp-tcb": [bytes([layout]) + bytes(range(1, 9)) for layout in (0, 1)] + [bytes(9), b"\1" + bytes(8)],
        "kvm-vcpu": [kvm_state.encode(_vcpu_state(xsave)) for xsave in (ioctls.XSAVE_BYTES, 2 * 4096)],
        "kvm-device": [
            hypervisor._DEVICE_STATE.pack(hypervisor._MAGIC, hypervisor._VERSION, 5_000_000, 1 << 20)
        ],
        "qemu-state": [
            Platform("", "", ()).pack() + b"QEVM",
            Platform(
                "pc-i440fx-7.2-machine", "qemu64-x86_64-cpu", ((1 << 30, 4096), (1 << 20, 2 << 20))
            ).pack(),
        ],
        "qmp-message": [
            b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": ["oob"]}}',
            b'{"return": {"status": "paused"}, "id": 7}',
            b'{"error": {"class": "GenericError", "desc": "no"}, "id": 7}',
            b'{"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}',
        ],
        "simulated-vcpu": [Registers.at_boot(Layout.plan(8 << 20, 2), vcpu).to_bytes() for vcpu in (0, 1)],
    }
    return own.get(target.name) or _attestation(target.name) or [b""]


def _vcpu_state(xsave_bytes: int) -> kvm_state.VcpuState:
    sizes = {field: least for _, field, _, least, _ in kvm_state._SECTIONS}
    sizes["xsave"] = xsave_bytes
    return kvm_state.VcpuState(**{field: bytes(size) for field, size in sizes.items()})


def _attestation(name: str) -> list[bytes]:
    if not (DATA / "INDEX.md").is_file():
        return []
    match name:
        case "snp-report":
            return [report(each) for each in NAMES]
        case "snp-table":
            return [path.read_bytes() for path in sorted(DATA.glob("*.auxblob.bin"))]
        case "snp-leaf":
            return [leaf(each, kind) for each, kind, _ in REAL]
        case _:
            crl = (DATA / "crl-milan-2023.der").read_bytes()
            return [
                b"\0--\0".join([leaf(each, kind), chain(kind, product), crl])
                for each, kind, product in REAL
                if product == "milan"
            ][:4]
