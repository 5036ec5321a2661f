"""Vectors of policy digests: the canonical JSON of each policy is written out by hand."""

from __future__ import annotations

import hashlib

# As docs/policy.md has the defaults, with both rules that have none set to "any".
OPEN = (
    '{"allow_debug":false,"allow_masked_chip_id":false,"allow_migration_agent":false,"allow_psk":false,'
    '"allow_same_machine":false,"allowed_chips":"any","author_keys":"any","denied_chips":[],"family_ids":"any","forbidden_guest_policy_bits":[],"forbidden_platform_bits":[],'
    '"host_data":"any","id_keys":"any","image_ids":"any","maximum_moves":"any","measurements":"any",'
    '"minimum_guest_svn":0,"minimum_tcb":"any","products":["Genoa","Milan","Turin"],"require_crl":false,'
    '"required_guest_policy_bits":[],"required_mitigations":0,"required_platform_bits":[],"vlek_providers":[],"vmpls":[0]}'
)
FULL = (
    '{"allow_debug":true,"allow_masked_chip_id":true,"allow_migration_agent":true,"allow_psk":true,'
    '"allow_same_machine":true,"allowed_chips":["0102030405060708"],"author_keys":["' + "aa" * 48 + '"],'
    '"denied_chips":["' + "01" * 64 + '","0202020202020202"],"family_ids":["' + "bb" * 16 + '"],'
    '"forbidden_guest_policy_bits":["CXL_ALLOW","SMT"],"forbidden_platform_bits":["SEV_TIO_EN"],"host_data":[],"id_keys":["'
    + "cc"
    * 48
    + '"],'
    '"image_ids":["' + "dd" * 16 + '"],"maximum_moves":100,'
    '"measurements":["' + "00" * 48 + '","' + "ff" * 48 + '"],"minimum_guest_svn":7,'
    '"minimum_tcb":['
    '{"bootloader":1,"fmc":0,"microcode":71,"product":"Turin","snp":2,"tee":0},'
    '{"bootloader":10,"microcode":88,"model":17,"product":"Genoa","snp":27,"tee":0}'
    '],"products":["Genoa","Turin"],"require_crl":true,"required_guest_policy_bits":["PAGE_SWAP_DISABLE"],"required_mitigations":9,'
    '"required_platform_bits":["ALIAS_CHECK_COMPLETE","ECC_EN"],'
    '"vlek_providers":["CN=\\u00fc","CN=x"],"vmpls":[0,1]}'
)
FULL_FILE: dict[str, object] = {
    "version": 1,
    "vmpls": [1, 0],
    "products": ["Turin", "Genoa"],
    "measurements": ["FF" * 48, "00" * 48],
    "minimum_tcb": [
        {"product": "Genoa", "model": 0x11, "bootloader": 10, "tee": 0, "snp": 27, "microcode": 88},
        {"product": "Turin", "fmc": 0, "bootloader": 1, "tee": 0, "snp": 2, "microcode": 71},
    ],
    "allow_debug": True,
    "allow_masked_chip_id": True,
    "allow_migration_agent": True,
    "allow_psk": True,
    "allow_same_machine": True,
    "allowed_chips": ["0102030405060708" + "00" * 56],
    "denied_chips": ["02" * 8, "01" * 64],
    "author_keys": ["aa" * 48],
    "id_keys": ["cc" * 48],
    "family_ids": ["bb" * 16],
    "image_ids": ["dd" * 16],
    "host_data": [],
    "maximum_moves": 100,
    "minimum_guest_svn": 7,
    "require_crl": True,
    "required_mitigations": 9,
    "required_platform_bits": ["ECC_EN", "ALIAS_CHECK_COMPLETE"],
    "forbidden_platform_bits": ["SEV_TIO_EN"],
    "required_guest_policy_bits": ["PAGE_SWAP_DISABLE"],
    "forbidden_guest_policy_bits": ["SMT", "CXL_ALLOW"],
    "vlek_providers": ["CN=x", "CN=\u00fc"],
}
OPEN_FILE: dict[str, object] = {"version": 1, "measurements": "any", "minimum_tcb": "any"}


def policies() -> dict[str, object]:
    return {
        "policies": [
            {
                "name": name,
                "file": file,
                "canonical": canonical,
                "digest": hashlib.sha384(b"pagexfer v1 policy" + canonical.encode("ascii")).hexdigest(),
            }
            for name, file, canonical in (
                ("all defaults", OPEN_FILE, OPEN),
                ("every rule, out of order", FULL_FILE, FULL),
            )
        ]
    }
