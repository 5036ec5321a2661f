"""Numbers that the protocol fixes, and the bounds they come from. Tuning lives elsewhere: changing anything here
changes what a peer must understand.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
WORDS_PER_PAGE: Final = PAGE_SIZE // 8

# A gfn takes 40 bits of an entry: 52 bits of guest physical address, all that x86-64 has.
GFN_BITS: Final = 40
MAX_PAGES: Final = 1 << GFN_BITS

# One 2 MiB region: a bundle never has more pages with content, so that one RMP entry of 2 MiB fits in one bundle.
MAX_BUNDLE_DATA_PAGES: Final = 512
# Pages without content are an entry each: 16 MiB of zeros are worth one bundle's fixed work, and no more than 32 KiB.
MAX_BUNDLE_ENTRIES: Final = 4096
# vCPU state is an x86 save area with its registers; the largest (XSAVE with AMX tiles and all MSRs) stays below 64 KiB.
MAX_STATE_BYTES: Final = 1 << 16
MAX_BUNDLE_PAYLOAD_BYTES: Final = MAX_BUNDLE_DATA_PAGES * PAGE_SIZE

# Channel 0 carries the tokens; the channel number is a u16 and 0xFFFF stays unused.
MAX_CHANNELS: Final = 1024
MAX_VCPUS: Final = 4096
# Connections that one channel may have in a session, the first and those that replaced a lost one: a record of each goes
# back to the source (15 KiB at most), and a channel that breaks more often is of no use.
MAX_INCARNATIONS: Final = 256

FIRST_EPOCH: Final = 1
FINAL_EPOCH: Final = 0xFFFFFFFF  # reserved for the start token and all that answers it (R3)

SESSION_ID_BYTES: Final = 16
GUEST_ID_BYTES: Final = 16
NONCE_BYTES: Final = 32  # of the handshake
DIGEST_BYTES: Final = 48  # SHA-384
TAG_BYTES: Final = 16
KEY_BYTES: Final = 32
GCM_NONCE_BYTES: Final = 12

# Bounds of one traffic key (direction x channel x incarnation). Nonces are counted, so they cannot collide; what
# bounds a key is the number of blocks under it. NIST SP 800-38D allows 2^36 - 32 bytes per record, of which we use
# 2^21. By the usual bound for GCM the advantage of a distinguisher after s blocks is below s^2 / 2^129, so 2^46 bytes
# (2^42 blocks) keep it below 2^-45, and the same amount of forged data succeeds with less than 2^-60. A channel that
# reaches a limit takes a new incarnation, hence a new key.
MAX_BUNDLES_PER_KEY: Final = (1 << 32) - 1
MAX_BYTES_PER_KEY: Final = 1 << 46
