"""Payloads of the tokens: epoch totals and manifest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagexfer.wire.handshake import Freshness
from pagexfer.wire.token import (
    ChannelRecord,
    EpochTotals,
    Manifest,
    parse_epoch_totals_untrusted,
    parse_manifest_untrusted,
)

from .wire_vectors import Vector, data_of, is_refused, load, name_of, only_whole, value_or_malformed

VECTORS = load("tokens")

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
digests = st.binary(min_size=48, max_size=48)
records = st.builds(ChannelRecord, channel=u16, incarnation=u16, bundles=u64, transcript=digests)
manifests = st.builds(
    Manifest,
    ram_pages=u64,
    last_epoch=u32,
    vcpus=u32,
    freshness=st.sampled_from(Freshness),
    content_digest=digests,
    state_digest=digests,
    vcpu_digest=digests,
    ledger_digest=digests,
    channels=st.lists(records, min_size=1, max_size=4).map(tuple),
)


def manifest_of(fields: Vector) -> Manifest:
    return Manifest(
        fields["ram_pages"],
        fields["last_epoch"],
        fields["vcpus"],
        Freshness(fields["freshness"]),
        bytes.fromhex(fields["content_digest"]),
        bytes.fromhex(fields["state_digest"]),
        bytes.fromhex(fields["vcpu_digest"]),
        bytes.fromhex(fields["ledger_digest"]),
        tuple(
            ChannelRecord(
                record["channel"],
                record["incarnation"],
                record["bundles"],
                bytes.fromhex(record["transcript"]),
            )
            for record in fields["channels"]
        ),
    )


@pytest.mark.parametrize("vector", VECTORS["epoch_totals"], ids=name_of)
def test_epoch_totals_of_vector(vector: Vector) -> None:
    totals = EpochTotals(vector["bundles"], vector["pages"])
    assert parse_epoch_totals_untrusted(data_of(vector)) == totals
    assert totals.pack() == data_of(vector)
    only_whole(parse_epoch_totals_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_epoch_totals"], ids=name_of)
def test_refused_epoch_totals(vector: Vector) -> None:
    is_refused(parse_epoch_totals_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["manifests"], ids=name_of)
def test_manifest_of_vector(vector: Vector) -> None:
    manifest = manifest_of(vector["fields"])
    assert parse_manifest_untrusted(data_of(vector)) == manifest
    assert manifest.pack() == data_of(vector)
    only_whole(parse_manifest_untrusted, data_of(vector))


@pytest.mark.parametrize("vector", VECTORS["refused_manifests"], ids=name_of)
def test_refused_manifest(vector: Vector) -> None:
    is_refused(parse_manifest_untrusted, data_of(vector))


@given(manifests)
def test_manifest_round_trip(manifest: Manifest) -> None:
    assert parse_manifest_untrusted(manifest.pack()) == manifest


@given(manifests, st.data())
def test_a_manifest_has_one_encoding(manifest: Manifest, data: st.DataObject) -> None:
    flipped = bytearray(manifest.pack())
    bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    parsed = value_or_malformed(parse_manifest_untrusted, bytes(flipped))
    if isinstance(parsed, Manifest):
        assert parsed != manifest
        assert parsed.pack() == bytes(flipped)


@given(st.binary(max_size=300) | st.binary(min_size=272, max_size=272))
def test_any_bytes_are_a_token_or_malformed(data: bytes) -> None:
    value_or_malformed(parse_epoch_totals_untrusted, data)
    value_or_malformed(parse_manifest_untrusted, data)


def test_as_many_channels_as_there_can_be() -> None:
    manifest = manifest_of(VECTORS["manifests"][0]["fields"])
    most = replace(manifest, channels=manifest.channels * 1024)
    assert parse_manifest_untrusted(most.pack()) == most
