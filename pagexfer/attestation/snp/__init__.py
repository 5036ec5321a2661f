"""Evidence of AMD SEV-SNP: reports, the certificates behind them, their verification, and where a guest gets its own."""

from .certificates import Endorsements, parse_endorsements_untrusted
from .product import Product, Tcb
from .providers import Evidence, Provider, find_provider
from .report import Report, SigningKey, parse_report_untrusted
from .roots import AMD_ROOTS, Root
from .table import CertificateTable, parse_certificate_table_untrusted
from .verify import SnpClaims, verify_report

__all__ = [
    "AMD_ROOTS",
    "CertificateTable",
    "Endorsements",
    "Evidence",
    "Product",
    "Provider",
    "Report",
    "Root",
    "SigningKey",
    "SnpClaims",
    "Tcb",
    "find_provider",
    "parse_certificate_table_untrusted",
    "parse_endorsements_untrusted",
    "parse_report_untrusted",
    "verify_report",
]
