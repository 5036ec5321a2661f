"""Makes the test vectors of the protocol from its description alone: nothing here imports the library.

Layouts, HKDF and msgpack are written out by hand; only hashes, AES-GCM, X25519 and ML-KEM come from elsewhere. So a vector
that the library agrees with was computed twice. The same files come out of every run:

    python tests/vectors/make_vectors.py            write the files
    python tests/vectors/make_vectors.py --check    exit 1 where a file on disk is not what the script makes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, the repository is not on the path

from tests.vectors import agreed, frames, ledger, plain, policies, sealed  # noqa: E402


def main() -> int:
    made = {
        "key_schedule": agreed.key_schedule(),
        "bundles": sealed.bundles(),
        "frames": frames.frames(),
        "handshake": agreed.handshake(),
        "slot": plain.slot(),
        "framing": plain.framing(),
        "control": plain.control(),
        "tokens": sealed.tokens(),
        "ledger": ledger.ledger(),
        "policy": policies.policies(),
        "journal": plain.journal(),
    }
    texts = {HERE / f"{name}.json": json.dumps(value, indent=1) + "\n" for name, value in made.items()}
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in texts.items() if not path.exists() or path.read_text() != text]
        sys.stdout.write(
            f"not what this script makes: {', '.join(stale)}\n" if stale else "all vectors hold\n"
        )
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
