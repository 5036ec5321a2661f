"""Names of the bits in a report: the guest's policy and the platform's information (AMD 56860)."""

from __future__ import annotations

import enum
from typing import Final

# Guest policy: bits 7:0 ABI minor, 15:8 ABI major, 17 always one, 63:26 zero.
POLICY_ALWAYS_ONE: Final = 1 << 17
POLICY_RESERVED: Final = ~((1 << 26) - 1) & (1 << 64) - 1


class GuestPolicyBit(enum.IntEnum):
    """Bit numbers of the policy under which a guest was launched."""

    SMT = 16
    MIGRATE_MA = 18
    DEBUG = 19
    SINGLE_SOCKET = 20
    CXL_ALLOW = 21
    MEM_AES_256_XTS = 22
    RAPL_DIS = 23
    CIPHERTEXT_HIDING = 24
    PAGE_SWAP_DISABLE = 25


class PlatformBit(enum.IntEnum):
    """Bit numbers of platform_info. A report may have others: they mean nothing to us and refuse nothing."""

    SMT_EN = 0
    TSME_EN = 1
    ECC_EN = 2
    RAPL_DIS = 3
    CIPHERTEXT_HIDING_EN = 4
    ALIAS_CHECK_COMPLETE = 5
    SEV_TIO_EN = 7


def guest_policy_names(policy: int) -> list[str]:
    """Names of the bits that are set."""
    return [bit.name for bit in GuestPolicyBit if policy >> bit & 1]


def platform_names(info: int) -> list[str]:
    """Names of the bits that are set, `bit6` and so on for those without a name."""
    known = {int(bit): bit.name for bit in PlatformBit}
    return [known.get(number, f"bit{number}") for number in range(64) if info >> number & 1]


def abi_version(policy: int) -> str:
    """Lowest firmware ABI that the guest's policy accepts, as major.minor."""
    return f"{policy >> 8 & 0xFF}.{policy & 0xFF}"
