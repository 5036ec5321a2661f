"""docs/protocol.md against the code: every number in its tables is the one that the code uses."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from pagexfer import errors
from pagexfer.attestation import psk
from pagexfer.engine import failure, reception
from pagexfer.svsm import compression, content, keys
from pagexfer.svsm import handshake as svsm_handshake
from pagexfer.svsm import ledger as svsm_ledger
from pagexfer.svsm.journal import _DURABLE_FIRST, _REPLACEABLE
from pagexfer.svsm.recovery import FINAL, judge, judge_both
from pagexfer.svsm.states import DESTINATION, SOURCE, Event
from pagexfer.wire import (
    bundle,
    constants,
    control,
    device_state,
    framing,
    handshake,
    journal,
    ledger,
    page_state,
    slot,
    token,
)

if TYPE_CHECKING:
    import enum
    from collections.abc import Mapping
    from types import ModuleType

TEXT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
Rows = list[list[str]]

STRUCTS: Final[dict[str, struct.Struct]] = {
    "Frame header": framing._FRAME,
    "Connection hello": framing._HELLO,
    "Identity line": slot._IDENTITY,
    "Command line": slot._COMMAND,
    "Status line": slot._STATUS,
    "Hello": handshake._HELLO,
    "End of the handshake": handshake._ESTABLISHED,
    "Bundle header": bundle._HEADER,
    "Nonce": bundle._NONCE,
    "Part of the device state": device_state._PART,
    "Epoch totals": token._EPOCH_TOTALS,
    "Manifest": token._MANIFEST,
    "Channel record": token._CHANNEL,
    "Ledger header": ledger._HEADER,
    "Record body": ledger._BODY,
    "Journal record": journal._RECORD,
}
ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "Frame types": framing.FrameType,
    "Connection purposes": framing.Purpose,
    "Slot statuses": slot.SlotStatus,
    "Refusal codes": errors.RefusalCode,
    "Session statuses": slot.SessionStatus,
    "Buffer states": slot.BufferState,
    "Commands": slot.Command,
    "Roles": handshake.Role,
    "Attestor kinds": handshake.AttestorKind,
    "Freshness modes": handshake.Freshness,
    "Bundle kinds": bundle.BundleKind,
    "Directions": bundle.Direction,
    "Operations": bundle.Operation,
}
# Where a constant of the table of numbers may come from.
MODULES: Final[tuple[ModuleType, ...]] = (
    constants,
    bundle,
    control,
    handshake,
    framing,
    device_state,
    slot,
    ledger,
    psk,
    keys,
    svsm_handshake,
    content,
    reception,
)


def sections() -> dict[str, str]:
    """The text below each heading of the third level, by heading without its size."""
    parts = re.split(r"^#{2,3} (.+)$", TEXT, flags=re.MULTILINE)[1:]
    return {
        re.sub(r" \(\d+ bytes\)$", "", heading): text
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def table(text: str, *columns: str) -> Rows:
    """The rows of the one table that begins with these columns."""
    lines = text.splitlines()
    (start,) = (index for index, line in enumerate(lines) if cells(line)[: len(columns)] == list(columns))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def number(text: str) -> int:
    """A number as the document writes it: decimal, hexadecimal, or a power of two with or without `- 1`."""
    if match := re.fullmatch(r"2\^(\d+)( - 1)?", text):
        return (1 << int(match[1])) - (1 if match[2] else 0)
    return int(text, 0)


def item_sizes(layout: struct.Struct) -> list[int]:
    return [struct.calcsize("<" + item) for item in re.findall(r"\d*[A-Za-z]", layout.format.lstrip("<"))]


def headed_size(heading: str) -> int:
    match = re.search(rf"^### {heading} \((\d+) bytes\)$", TEXT, flags=re.MULTILINE)
    assert match is not None, heading
    return int(match[1])


@pytest.mark.parametrize("heading", STRUCTS)
def test_layout(heading: str) -> None:
    layout = STRUCTS[heading]
    rows = table(sections()[heading], "offset", "size", "field")
    sizes = [int(size) for _, size, *_ in rows]
    assert sizes == item_sizes(layout)
    assert [int(offset) for offset, *_ in rows] == [sum(sizes[:index]) for index in range(len(sizes))]
    assert sum(sizes) == layout.size == headed_size(heading)


def test_every_layout_of_the_document_is_compared() -> None:
    assert set(re.findall(r"^### (.+) \(\d+ bytes\)$", TEXT, flags=re.MULTILINE)) == set(STRUCTS)
    assert TEXT.count("| offset | size |") == len(STRUCTS)


@pytest.mark.parametrize("heading", ENUMS)
def test_enumeration(heading: str) -> None:
    rows = table(sections()[heading], "number", "name")
    assert [(int(row[0]), row[1]) for row in rows] == [
        (member.value, member.name) for member in sorted(ENUMS[heading])
    ]


def test_every_enumeration_of_the_document_is_compared() -> None:
    assert TEXT.count("| number | name |") == len(ENUMS)


def test_frame_caps() -> None:
    rows = table(sections()["Frame types"], "number", "name", "cap")
    assert {framing.FrameType(int(row[0])): int(row[2]) for row in rows} == framing._MAX_PAYLOAD


def test_constants() -> None:
    rows = table(sections()["10. Numbers"], "constant", "value")
    for name, value, *_ in rows:
        (found,) = {getattr(module, name) for module in MODULES if hasattr(module, name)}
        assert found == number(value), name
    public = {name for name, value in vars(constants).items() if name.isupper() and isinstance(value, int)}
    assert public <= {row[0] for row in rows}


def test_control_messages() -> None:
    rows = table(sections()["3. Control messages"], "type", "keys")
    documented = {row[0]: [key.strip() for key in row[1].split(",")] for row in rows}
    assert documented == {
        name: [f"{field.name}: {field.type}" for field in fields(message_type)]
        for name, message_type in control._NAMES.items()
    }
    assert f"at most {control._MAX_TEXT} characters" in TEXT


def test_reasons() -> None:
    documented = {row[0] for row in table(sections()["3. Control messages"], "reason", "meaning")}
    assert {reason for reason, _ in failure._REFUSALS.values()} <= documented
    engine = Path(failure.__file__).parent
    literals = {
        reason
        for path in engine.glob("*.py")
        for reason in re.findall(r'TransferAborted\(\s*Outcome\.\w+,\s*"([a-z-]+)"', path.read_text())
    }
    assert literals
    assert literals <= documented


@pytest.mark.parametrize(
    ("heading", "transitions"),
    [("Transitions of a source", SOURCE), ("Transitions of a destination", DESTINATION)],
)
def test_transitions(
    heading: str, transitions: Mapping[tuple[slot.SessionStatus, Event], slot.SessionStatus]
) -> None:
    rows = table(sections()[heading], "state", "event", "next")
    assert len({(state, event) for state, event, _ in rows}) == len(rows)
    assert {
        (slot.SessionStatus[state], Event[event]): slot.SessionStatus[to] for state, event, to in rows
    } == (dict(transitions))


def test_frames_of_compressed_pages() -> None:
    (few, low), (many, high) = table(sections()["Frame of a PAGES_ZSTD bundle"], "d", "frame begins with")
    magic = f"magic `{compression._MAGIC.hex(' ')}`"
    for span, form, layout, descriptor in (
        (few, low, compression._FRAME_2, compression._SIZE_IN_2),
        (many, high, compression._FRAME_4, compression._SIZE_IN_4),
    ):
        first, last = (int(end) for end in span.split(" to "))
        assert form.startswith(f"{magic}, descriptor 0x{descriptor:X}, u{(layout.size - 5) * 8} d ")
        assert len(compression.frame_head(first)) == len(compression.frame_head(last)) == layout.size
    assert low.endswith(str(compression._SIZE_2_OFFSET))
    assert int(few.split()[-1]) + 1 == int(many.split()[0])
    assert int(many.split()[-1]) == constants.MAX_BUNDLE_DATA_PAGES


def bits(rows: Rows) -> dict[str, int]:
    """The mask of each field of a table of bits, which leaves no gap."""
    masks = {}
    next_bit = 0
    for span, field, *_ in rows:
        low, _, high = span.partition("-")
        assert int(low) == next_bit
        next_bit = int(high or low) + 1
        masks[field] = (1 << next_bit) - (1 << int(low))
    return masks


def test_bits_of_an_entry() -> None:
    masks = bits(table(sections()["Entry"], "bits", "field"))
    assert sum(masks.values()) == (1 << 64) - 1

    def packed(gfn: int, operation: int, state: int) -> int:
        columns = np.array([gfn], np.int64), np.array([operation], np.uint8), np.array([state], np.uint32)
        return int.from_bytes(bundle.pack_entries(*columns), "little")

    assert packed((1 << constants.GFN_BITS) - 1, 0, 0) == masks["gfn"]
    assert packed(0, 3, 0) == masks["operation"]
    assert packed(0, 0, page_state.STATE_MASK) == masks["page state"]


def test_bits_of_a_page_state() -> None:
    masks = bits(table(sections()["Page state"], "bits", "field"))
    assert masks == {
        "size": page_state.SIZE_2M,
        "validated": page_state.VALIDATED,
        "shared": page_state.SHARED,
        "vmsa": page_state.VMSA,
        **{f"VMPL{vmpl}": 31 << page_state.vmpl_shift(vmpl) for vmpl in (1, 2, 3)},
    }
    assert sum(masks.values()) == page_state.STATE_MASK


def test_offsets_of_the_slot_lines() -> None:
    for heading, offset in (
        ("Identity line", slot.IDENTITY_OFFSET),
        ("Command line", slot.COMMAND_OFFSET),
        ("Status line", slot.STATUS_OFFSET),
    ):
        assert f"At offset {offset}, written" in sections()[heading]
    assert f"host's line (offset {slot.HOST_DATA_OFFSET})" in TEXT
    assert f"SVSM's line (offset {slot.SVSM_DATA_OFFSET})" in " ".join(TEXT.split())
    magic = slot.SLOT_MAGIC.to_bytes(8, "little")
    assert f"`{magic.decode()}`" in TEXT
    assert f"`{magic.hex(' ')}`" in TEXT


def test_labels_of_the_table_digests() -> None:
    documented = re.findall(r'"(pagexfer [^"]+)"', sections()["Channel record"])
    assert documented == [content._CONTENT_LABEL.decode(), content._STATE_LABEL.decode()]


def test_labels() -> None:
    labels = [keys._TRANSCRIPT_LABEL, keys._SESSION_LABEL, keys._EVIDENCE_LABEL, keys._TRAFFIC_LABEL]
    labels += [keys._PROVED_LABEL, *keys._CONFIRMATION_LABELS.values()]
    labels += [*keys._ROLE_LABELS.values(), psk._SALT, psk._EVIDENCE_INFO, psk._CONTRIBUTION_INFO]
    schedule = sections()["6. Key schedule"]
    assert sorted(re.findall(r'"(pagexfer [^"]+)"', schedule)) == sorted(label.decode() for label in labels)
    labels = [svsm_ledger._RECORD_LABEL, *svsm_ledger._SIGNATURE_LABELS.values()]
    ledgers = sections()["Record body"]
    assert sorted(re.findall(r'"(pagexfer [^"]+)"', ledgers)) == sorted(label.decode() for label in labels)


def test_rules_of_a_ledger() -> None:
    documented = {row[0] for row in table(sections()["Record body"], "rule", "holds when")}
    source = Path(svsm_ledger.__file__).read_text()
    used = set(re.findall(r'"([a-z_]+)",?\s+(?:number|move|body\.move|evidence\.move)\b', source))
    assert used | {f"{role.name.lower()}_signature" for role in handshake.Role} == documented
    for magic in (ledger.LEDGER_MAGIC, ledger.RECORD_MAGIC):
        assert f"`{magic.decode()}`" in TEXT


def test_journal() -> None:
    rows = table(sections()["Journaled statuses"], "role", "status", "written")
    documented = [(handshake.Role[role], slot.SessionStatus[status]) for role, status, *_ in rows]
    assert sorted(documented) == sorted(
        (role, status) for role in handshake.Role for status in journal.JOURNALED[role]
    )
    assert all(
        (status in _DURABLE_FIRST) is (row[2] == "first")
        for (_, status), row in zip(documented, rows, strict=True)
    )
    magic = journal.JOURNAL_MAGIC.to_bytes(4, "little").decode()
    assert f"`{magic}`" in sections()["Journal record"]
    kept = {status for _, status in documented} - _REPLACEABLE
    (named,) = re.findall(r"record that says ([A-Z, or]+)\.", " ".join(TEXT.split()))
    assert {slot.SessionStatus[name] for name in re.findall(r"[A-Z]+", named)} == kept
    (named,) = re.findall(r"lives, only ([A-Z, and]+) are an answer", " ".join(TEXT.split()))
    assert {slot.SessionStatus[name] for name in re.findall(r"[A-Z]+", named)} == FINAL


def record(role: handshake.Role, status: str) -> journal.JournalRecord:
    return journal.JournalRecord(role, slot.SessionStatus[status], bytes(16), bytes(16))


def test_who_may_run_by_one_journal() -> None:
    rows = table(sections()["One journal"], "role", "status", "may run")
    assert len({(role, status) for role, status, _ in rows}) == 8
    for role, status, may_run in rows:
        assert judge(record(handshake.Role[role], status), active=False).may_run.value == may_run


def test_who_may_run_by_both_journals() -> None:
    source, destination = handshake.Role.SOURCE, handshake.Role.DESTINATION
    columns = ("KEYED", "VERIFIED", "RUNNING", "FAILED")
    rows = table(sections()["Both journals"], "source", *columns)
    assert [row[0] for row in rows] == ["KEYED", "STARTED", "FINISHED", "ABORTED"]
    for ours, *answers in rows:
        for theirs, answer in zip(columns, answers, strict=True):
            verdict = judge_both(record(source, ours), record(destination, theirs), active=False)
            if verdict.runner is None:
                assert {"abandon": "--abandon", "contradiction": "contradict"}[answer] in verdict.advice
            else:
                assert verdict.runner is handshake.Role[answer.upper()]
