"""Numbers as people read them."""

__all__ = ["amount", "count"]


def amount(nbytes: int) -> str:
    """Bytes in the binary unit in which three or four digits remain: `2.00 MiB`, `131,072 B` below 1 MiB."""
    if abs(nbytes) < 1 << 20:
        return f"{nbytes:,} B"
    units = ("MiB", "GiB", "TiB", "PiB", "EiB")
    power = next(power for power in range(2, 7) if power == 6 or abs(nbytes) < 1024 ** (power + 1))
    return f"{nbytes / 1024**power:,.2f} {units[power - 2]}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`1 token`, `2 tokens`; `plural` where that is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
