"""Emulated SEV-SNP, insecure by design: reports under a certificate authority that anybody can make.

With it the whole attested handshake runs on machines without SEV-SNP. It proves nothing of any platform: whoever has the
authority's file can make any report. A side accepts such reports only where it was given that file by name.
"""

from .attestor import EmulatedAttestor, EmulatedProvider
from .authority import EmulatedAuthority

__all__ = ["EmulatedAttestor", "EmulatedAuthority", "EmulatedProvider"]
