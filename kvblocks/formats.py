"""How one number of a cache is stored: plain dtypes, and packed ones with their scales. No torch."""

import math
from dataclasses import dataclass, replace
from typing import Any

from kvblocks.config import itemsize
from kvblocks.sizes import checked_integer

__all__ = ["LLAMA_CPP", "Format", "dtype_name", "format_of", "narrower"]

# Shorter names for what people call them, and the packed formats that are no dtype.
_ALIASES = {"fp8": "float8_e4m3fn", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
# As serving engines call them: vLLM and SGLang, and llama.cpp.
_ALIASES |= {"fp8_e4m3": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_ALIASES |= {"f16": "float16", "f32": "float32", "float": "float32"}
_PACKED_BITS = {"int4": 4, "int2": 2}
# llama.cpp's formats of K and V: bits of a number, and whether 32 of them keep a minimum besides their float16 scale.
_BLOCKED = {"q8_0": (8, False), "q5_1": (5, True), "q5_0": (5, False), "q4_1": (4, True), "q4_0": (4, False)}
_BLOCKED |= {"iq4_nl": (4, False)}
_BLOCK = 32
# What llama.cpp keeps K and V in (common/arg.cpp, kv_cache_types).
LLAMA_CPP = ("float32", "float16", "bfloat16", *_BLOCKED)
_SCALES = ("float16", "bfloat16", "float32", "float8_e4m3fn")
# What a search for a smaller dtype goes through, from wide to narrow: the first is the widest that still fits.
_NARROWER = ("float32", "bfloat16", "float8_e4m3fn", "int4")
_NARROWER_LLAMA_CPP = ("float32", "float16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Format:
    """The storage of K and V: `bits` for each number, and a scale for each `group_size` numbers of one head.

    Args:
        name: a dtype as `CacheConfig` names it; "int4", "int2": two and four numbers in a byte; or llama.cpp's "q8_0",
            "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl".
        bits: of one number.
        group_size: numbers of one head's vector that share a scale; None where scales are not kept per token.
        scale_dtype: of a scale, and of a zero point.
        zero_point: each group keeps one besides its scale.
        values: the format of V, where it is not that of K; None where it is.
    """

    name: str
    bits: int
    group_size: int | None = None
    scale_dtype: str = "float16"
    zero_point: bool = False
    values: "Format | None" = None

    @property
    def is_float(self) -> bool:
        """A plain float of 16 bits or more, which a model could compute in."""
        return self.name in ("float16", "bfloat16", "float32", "float64")

    @property
    def is_dtype(self) -> bool:
        """Stored as one dtype, without packing and without scales in the cache."""
        return self.bits >= 8 and self.group_size is None and self.values is None

    def scales(self, dim: int) -> int:
        """Scales that one head's vector of `dim` numbers keeps."""
        return 0 if self.group_size is None else math.ceil(dim / self.group_size)

    def vector_bytes(self, dim: int) -> int:
        """Bytes of one head's vector of `dim` numbers, scales and zero points included."""
        if not dim:
            return 0
        scale_bytes = itemsize(self.scale_dtype) * (2 if self.zero_point else 1)
        return math.ceil(dim * self.bits / 8) + self.scales(dim) * scale_bytes


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, given as one of torch's or as a name. Not checked against what a cache can hold."""
    name = dtype if isinstance(dtype, str) else str(dtype)
    name = name.removeprefix("torch.")
    return _ALIASES.get(name, name)


def format_of(
    dtype: Any, group_size: int | None = None, scale_dtype: Any = "float16", zero_point: bool = False
) -> Format:
    """The format that a caller's `dtype` names.

    Raises:
        TypeError: not a dtype that a cache can hold, nor a packed one.
        ValueError: scales for a dtype that has none, or a group size that is not positive.
    """
    name = dtype_name(dtype)
    if "," in name:
        parts = name.split(",")
        if len(parts) != 2:
            raise ValueError(f"dtype={name!r:.60} names {len(parts)} dtypes; give one, or one for K and one for V")
        both = [format_of(part.strip(), group_size, scale_dtype, zero_point) for part in parts]
        return both[0] if both[0] == both[1] else replace(both[0], values=both[1])
    if name in _BLOCKED:
        bits, minimum = _BLOCKED[name]
        if group_size not in (None, _BLOCK):
            raise ValueError(f"group_size={group_size!r:.60}: {name} has a scale for each {_BLOCK} numbers")
        return Format(name, bits, _BLOCK, zero_point=minimum)
    bits = _PACKED_BITS.get(name, 0)
    if not bits:
        try:
            bits = 8 * itemsize(dtype if name == dtype else name)
        except TypeError as error:
            raise TypeError(f"{error}; or {', '.join([*_PACKED_BITS, *_BLOCKED])}") from None
    if not isinstance(zero_point, bool):
        raise TypeError(f"zero_point={zero_point!r} is no bool")
    if group_size is None:
        if zero_point:
            raise ValueError("zero_point=True without group_size: zero points are kept one to a group")
        return Format(name, bits)
    group_size = checked_integer("group_size", group_size)
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is below 1; it counts the numbers that share a scale")
    if bits > 8:
        raise ValueError(f"dtype={name} has no scales; group_size={group_size} is for 8-bit and packed dtypes")
    scale = dtype_name(scale_dtype)
    if scale not in _SCALES:
        raise ValueError(f"scale_dtype={scale} is not one of {', '.join(_SCALES)}")
    return Format(name, bits, group_size, scale, zero_point)


def narrower(than: Format, engine: str = "kvblocks") -> list[Format]:
    """Formats with fewer bits that an engine has, the widest first.

    int4 brings a float16 scale for each 32 numbers, as is customary.
    """
    names = _NARROWER_LLAMA_CPP if engine == "llama.cpp" else _NARROWER
    found = [format_of(name, 32) if name == "int4" else format_of(name) for name in names]
    return [candidate for candidate in found if candidate.bits < than.bits]
