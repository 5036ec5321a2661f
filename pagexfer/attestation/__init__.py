"""Evidence of who a side is: providers and verifiers behind one port."""

from .attestor import Attestor, Claims
from .psk import PskAttestor

__all__ = ["Attestor", "Claims", "PskAttestor"]
