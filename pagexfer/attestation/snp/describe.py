"""Reports and claims as names and plain values, for people and for JSON. Byte strings are hex in report order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bits import abi_version, guest_policy_names, platform_names
from .product import parse_tcb_untrusted
from .report import NO_MIGRATION_AGENT, SigningKey

if TYPE_CHECKING:
    from .report import Report
    from .verify import SnpClaims

_TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")


def describe_report(report: Report) -> dict[str, object]:
    """Every field of a report that nobody verified.

    A TCB is by part where the report names a known processor (version 3 and later), else its raw bytes: only a certificate
    could tell. Raises MalformedData where a TCB does not have the form that the processor gives it.
    """
    product = report.cpuid.product if report.cpuid is not None else None
    tcbs: dict[str, object] = {
        name: getattr(report, name).hex()
        if product is None
        else parse_tcb_untrusted(getattr(report, name), product.tcb_layout).parts()
        for name in _TCBS
    }
    return {"product": None if product is None else product.value, **_fields(report, tcbs)}


def describe_claims(claims: SnpClaims) -> dict[str, object]:
    """Every field of a verified report, and what its certificates add."""
    tcbs: dict[str, object] = {name: getattr(claims, name).parts() for name in _TCBS}
    return {
        "product": claims.product.value,
        **_fields(claims.report, tcbs),
        "certified_chip": None if claims.chip is None else claims.chip.hex(),
        "csp_id": claims.csp_id,
        "crl_checked": claims.crl_checked,
        "certificates_valid_from": claims.valid_from.isoformat(),
        "certificates_valid_until": claims.valid_until.isoformat(),
        "digest": claims.digest.hex(),
    }


def _fields(report: Report, tcbs: dict[str, object]) -> dict[str, object]:
    keys = {int(key): key.name for key in SigningKey}
    cpuid = report.cpuid
    return {
        "version": report.version,
        "vmpl": report.vmpl,
        "guest_svn": report.guest_svn,
        "policy": f"{report.policy:#x}",
        "policy_abi": abi_version(report.policy),
        "policy_bits": guest_policy_names(report.policy),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "platform_info": f"{report.platform_info:#x}",
        "platform_bits": platform_names(report.platform_info),
        "signature_algo": report.signature_algo,
        "signing_key": keys.get(report.signing_key, f"unknown ({report.signing_key})"),
        "author_key_enabled": report.author_key_enabled,
        "chip_key_masked": report.chip_key_masked,
        "report_data": report.report_data.hex(),
        "measurement": report.measurement.hex(),
        "host_data": report.host_data.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "migration_agent": report.report_id_ma != NO_MIGRATION_AGENT,
        **tcbs,
        "cpuid": None
        if cpuid is None
        else {"family": cpuid.family, "model": cpuid.model, "stepping": cpuid.stepping},
        "chip_id": report.chip_id.hex(),
        "chip_id_masked": report.chip_id_masked,
        "current_version": str(report.current_version),
        "committed_version": str(report.committed_version),
        "launch_mit_vector": _vector(report.launch_mit_vector),
        "current_mit_vector": _vector(report.current_mit_vector),
        "signature_r": f"{report.signature_r:096x}",
        "signature_s": f"{report.signature_s:096x}",
    }


def _vector(value: int | None) -> str | None:
    return None if value is None else f"{value:#x}"
