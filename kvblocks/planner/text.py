"""Numbers as people read them."""

import re
from decimal import Decimal
from fractions import Fraction

__all__ = ["amount", "count", "parse_size"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", 1)}


def amount(nbytes: int) -> str:
    """Bytes in the binary unit in which three or four digits remain: `2.00 MiB`, `131,072 B` below 1 MiB."""
    if abs(nbytes) < 1 << 20:
        return f"{nbytes:,} B"
    units = ("MiB", "GiB", "TiB", "PiB", "EiB")
    power = next(power for power in range(2, 7) if power == 6 or abs(nbytes) < 1024 ** (power + 1))
    return f"{nbytes / 1024**power:,.2f} {units[power - 2]}"


def count(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def parse_size(text: str) -> int:
    """Bytes in a size such as 80GiB, 1.5GB, 4096.

    Raises:
        ValueError: no size, or 2**63 bytes and more.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", text, re.ASCII | re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r:.60} is not a size; give one like 80GiB, 1.5GB or 1048576")
    size = int(Fraction(Decimal(match[1])) * _UNITS[match[2].upper()])
    if size >= 2**63:
        raise ValueError(f"{text!r:.60} is more than 2**63 - 1 bytes")
    return size
