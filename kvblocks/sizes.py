"""Sizes in bytes as people write them. Imports nothing but the standard library."""

import re
from decimal import Decimal
from fractions import Fraction

__all__ = ["parse_size"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", 1)}


def parse_size(text: str) -> int:
    """Bytes in a size such as "64MiB", "1.5GB", "4096".

    Raises:
        ValueError: it is none, or more than 2**63 - 1.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", text, re.ASCII | re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r:.60} is not a size; give one like 64MiB, 1.5GB or 1048576")
    size = int(Fraction(Decimal(match[1])) * _UNITS[match[2].upper()])
    if size >= 2**63:
        raise ValueError(f"{text!r:.60} is more than 2**63 - 1 bytes")
    return size
