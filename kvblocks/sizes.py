"""Integers, and sizes, lengths and shares as people write them: what is asked of them, in one place for all callers.

Imports nothing but the standard library.
"""

import re
import reprlib
from decimal import Decimal
from fractions import Fraction
from operator import index
from typing import SupportsIndex

__all__ = [
    "HEADER_BYTES",
    "LAYOUTS",
    "budget",
    "checked_bytes",
    "checked_integer",
    "checked_size",
    "parse_length",
    "parse_share",
    "parse_size",
    "shown",
]

HEADER_BYTES = 4096  # before the bytes of a block, in a host slot and in whatever a store keeps
LAYOUTS = ("HDN", "NHD", "HND", "X")  # of the blocks of a cache; `PagedKVCache` says what they are

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)}
_UNITS |= {f"{prefix}{rest}": 1024**power for power, prefix in enumerate("KMGTP", 1) for rest in ("", "IB")}


def shown(value: object) -> str:
    """A short repr for an error: whatever the value is, this neither fails nor fills the screen."""
    if isinstance(value, int) and abs(value) >> 128:
        return f"<an int of {value.bit_length()} bits>"  # past 4300 digits str() itself raises
    return reprlib.repr(value)


def checked_integer(name: str, value: SupportsIndex, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int of Python's, in low..high where these are given.

    Raises:
        TypeError: it is no integer; a bool is none.
        ValueError: it is out of bounds.
    """
    bounds = "" if low is None else f" in {low}..{high}"
    # A bool is an int to Python, and a bool tensor has an __index__: neither is ever meant as a size.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError(f"{name}={shown(value)} is a bool; give an integer{bounds}")
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}={shown(value)} is of type {type(value).__name__}; give an integer{bounds}") from None
    if low is not None and high is not None and not low <= number <= high:
        raise ValueError(f"{name}={shown(number)} is outside {low}..{high}")
    return number


def checked_size(name: str, value: SupportsIndex) -> int:
    """A size or a count: an integer in 1..2**31 - 1, as all that compiled code counts with."""
    return checked_integer(name, value, 1, 2**31 - 1)


def parse_size(text: str, name: str = "") -> int:
    """Bytes in a size such as "64MiB", "1.5GB", "80G", "4096". K, M, G, T and P alone are powers of 1,024.

    Args:
        name: of the argument that is read, for the error.

    Raises:
        ValueError: it is none, or more than 2**63 - 1.
    """
    given = f"{name}=" if name else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", text, re.ASCII | re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{given}{text!r:.60} is not a size; give one like 64MiB, 1.5GB or 1048576")
    size = int(Fraction(Decimal(match[1])) * _UNITS[match[2].upper()])
    if size >= 2**63:
        raise ValueError(f"{given}{text!r:.60} is more than 2**63 - 1 bytes")
    return size


def checked_bytes(name: str, value: str | SupportsIndex) -> int:
    """Bytes that a number of bytes, or text such as "8GiB", stands for.

    Raises:
        ValueError: text that is no size, or a number outside 1..2**63 - 1.
        TypeError: neither text nor an integer.
    """
    if isinstance(value, str):
        size = parse_size(value, name)
    elif isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} is a {type(value).__name__}; give bytes as an int, or text like '64MiB'")
    else:
        size = index(value)
    if not 0 < size < 2**63:
        raise ValueError(f"{name}={value!r} must be 1 to 2**63 - 1 bytes")
    return size


def parse_length(text: str) -> int:
    """Tokens in a length such as "8192", "32k", "1M": k is 1,024 and M 1,048,576, as lengths of models are given.

    Raises:
        ValueError: it is none, or no whole number of tokens.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KM]?)\s*", text, re.ASCII | re.IGNORECASE)
    tokens = (
        Fraction(0) if match is None else Fraction(Decimal(match[1])) * 1024 ** " KM".index(match[2].upper() or " ")
    )
    if match is None or tokens.denominator != 1:
        raise ValueError(f"{text!r:.60} is not a number of tokens; give one like 8192, 32k or 1M")
    return int(tokens)


def parse_share(text: str) -> Fraction:
    """The share that a percentage such as "90%" is.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r:.60} is not a share; give one like 90%")
    return Fraction(Decimal(match[1])) / 100


def budget(memory: str | int, free: int) -> int:
    """Bytes that "90%" of `free`, "1.5GiB", or a number of bytes stands for.

    Raises:
        ValueError: it is none of these, not above 0, above 100%, or more than is free.
        TypeError: it is neither text nor an integer.
    """
    if isinstance(memory, bool) or not isinstance(memory, str | int):
        raise TypeError(f"memory={memory!r} is a {type(memory).__name__}; give bytes, or text like '8GiB' or '90%'")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", memory.strip()) if isinstance(memory, str) else None
    if share is not None:
        nbytes = int(free * min(Fraction(share[1]) / 100, Fraction(2)))
    elif isinstance(memory, str):
        try:
            nbytes = parse_size(memory)
        except ValueError:
            nbytes = -1
        if nbytes < 0 or memory.strip().isdecimal():  # a number alone may be a share that lacks its sign
            raise ValueError(
                f"memory={memory!r:.60} is neither a size, like '8GiB' or '512MiB', nor a share, like '90%'"
            )
    else:
        nbytes = memory
    if not 0 < nbytes <= free:
        raise ValueError(f"memory={memory!r} is {nbytes} bytes; give 1 to the {free} that are free")
    return nbytes
