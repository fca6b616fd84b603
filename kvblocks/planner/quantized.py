"""What a quantized checkpoint takes for a matrix, by its `quantization_config`. No torch, and no file is read.

Says which matrices are quantized, and of each what is stored: its numbers, and scales, zero points and indices with
them. What `quantization_config` leaves open is an error.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvblocks.errors import UnknownModel
from kvblocks.models.read import quantization_config

__all__ = ["OTHERWISE", "Quantization", "Scheme", "quantization_of", "read_quantization"]

# What answers for weights that no config does.
OTHERWISE = "no safetensors lie beside the config, which would say it; give their folder or hub id, or the bytes"


@dataclass(frozen=True)
class Scheme:
    """How quantized matrices are stored.

    Args:
        bits: of one number.
        group: numbers of a row (one output) that share a scale; None for one scale a row, 0 for one a matrix.
        rows: rows that share a scale besides, where a scale is a block's.
        scale_bytes: of one scale.
        zero_bits: of the zero point beside each scale; 0 for none.
        input_bytes: bytes besides for each input of a matrix, like GPTQ's index of groups.
        matrix_bytes: bytes besides for each matrix, like a scale for the whole of it.
        experts_only: whether only the experts of a mixture of experts are quantized.
    """

    bits: int
    group: int | None
    rows: int = 1
    scale_bytes: float = 2
    zero_bits: int = 0
    input_bytes: int = 0
    matrix_bytes: int = 0
    experts_only: bool = False

    def stored_bytes(self, outputs: int, inputs: int, matrices: int = 1) -> int:
        """Bytes of so many matrices of `outputs` rows of `inputs` numbers."""
        across = 1 if self.group is None else math.ceil(inputs / self.group) if self.group else 0
        scales = math.ceil(outputs / self.rows) * across
        each = math.ceil(outputs * inputs * self.bits / 8) + math.ceil(scales * (self.scale_bytes + self.zero_bits / 8))
        return matrices * (each + inputs * self.input_bytes + self.matrix_bytes)


@dataclass(frozen=True)
class Quantization:
    """A `quantization_config`, read.

    Args:
        method: its name, for the reader.
        groups: names of matrices, and how these are stored; None where they are not quantized. The first group that
            names a matrix counts.
        named: what the config names as not quantized.
        output: whether the output's matrix is quantized where nothing names it.
        text_only: whether vision and audio towers are left out.
    """

    method: str
    groups: tuple[tuple["_Names", Scheme | None], ...]
    named: tuple[str, ...] = ()
    output: bool = False
    text_only: bool = False

    def scheme(self, name: str) -> Scheme | None:
        """How the matrix of this name is stored; None where it is not quantized."""
        lines = _lines([name])
        return next((scheme for names, scheme in self.groups if names.mean(lines)), None)

    def strange(self, names: Iterable[str]) -> list[str]:
        """What the config names as not quantized and is none of a model's modules and parameters."""
        lines = _lines(names)
        return [name for name in self.named if not _Names([name]).mean(lines)]


def quantization_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool] | None:
    """The `quantization_config` of a model's config or of its text half, and whether it is that of the half alone.

    None where there is none.
    """
    halves = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for half in halves:
        found = quantization_config(half)
        if found:
            return found, half is not config
    return None


def read_quantization(config: Mapping[str, Any], expert_dtype: Any = None) -> Quantization:
    """What a `quantization_config` says of every matrix.

    Args:
        config: the `quantization_config`.
        expert_dtype: the field of this name beside it, by which DeepSeek V4 says how experts are stored.

    Raises:
        UnknownModel: a method that is not known here, or a setting by which matrices differ in a way not known here.
    """
    method = str(config.get("quant_method") or config.get("quant_algo") or "")
    if config.get("quant_algo") == "MIXED_PRECISION" or config.get("quantized_layers"):
        raise _unknown("quant_algo", config.get("quant_algo"), "matrices are stored in several ways")
    if method in _GROUPED:
        return _by_groups(config, method)
    reader = _READERS.get(method)
    if reader is None:
        raise _unknown("quant_method", method, f"known are {', '.join(sorted([*_READERS, *_GROUPED]))}")
    named = _names(config, "modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers")
    experts = {"fp4": [(_Names(["experts"]), _mxfp4(config))], "fp8": []}
    if expert_dtype not in (None, *experts) or (expert_dtype is not None and method != "fp8"):
        raise _unknown("quant_method", method, f"how it goes with expert_dtype={expert_dtype!r:.30} is not known here")
    groups = ((_Names(named), None), *experts.get(expert_dtype or "", []), (_Names(["*"]), reader(config)))
    return Quantization(method, groups, named, text_only=method in ("gptq", "awq", "auto-round"))


def _unknown(field: str, value: Any, why: str) -> UnknownModel:
    return UnknownModel(f"weights='auto': quantization_config.{field}={value!r:.60}: {why}; {OTHERWISE}")


def _names(config: Mapping[str, Any], *fields: str) -> tuple[str, ...]:
    found: list[str] = []
    for field in fields:
        names = config.get(field) or []
        if not isinstance(names, list | tuple):
            raise _unknown(field, names, "no list of names")
        found += map(str, names)
    return tuple(found)


def _integer(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if type(value) is not int or not -1 <= value < 2**31 or value == 0 or (value < 0 and "bits" in field):
        raise _unknown(field, value, "no number of bits or of a group")
    return value


def _group(size: int) -> int | None:
    return None if size == -1 else size


def _block(config: Mapping[str, Any], field: str) -> tuple[int, int]:
    block = config.get(field)
    if not isinstance(block, list | tuple) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise _unknown(field, block, "no two numbers of rows and columns")
    return block[0], block[1]


# --- methods with one scheme for all


def _fp8(config: Mapping[str, Any]) -> Scheme:
    """A float32 for each block, in `weight_scale_inv`, or for each matrix."""
    if config.get("weight_block_size") is None:
        return Scheme(8, 0, matrix_bytes=4)
    rows, columns = _block(config, "weight_block_size")
    return Scheme(8, columns, rows=rows, scale_bytes=4)


def _awq(config: Mapping[str, Any]) -> Scheme:
    """`qweight`, `scales` in float16 and `qzeros`."""
    bits = _integer(config, "bits")
    return Scheme(bits, _group(_integer(config, "group_size", -1)), zero_bits=bits if config.get("zero_point") else 0)


def _gptq(config: Mapping[str, Any]) -> Scheme:
    """`qweight`, `scales` in float16, `qzeros` and `g_idx`, an int32 for each input."""
    for field in ("dynamic", "extra_config", "modules_in_block_to_quantize"):
        if config.get(field):
            raise _unknown(field, config[field], "matrices are stored in several ways")
    if config.get("lm_head"):
        raise _unknown("lm_head", config["lm_head"], "how the output's matrix is stored is not known here")
    bits = _integer(config, "bits")
    return Scheme(bits, _group(_integer(config, "group_size", -1)), zero_bits=bits, input_bytes=4)


def _auto_round(config: Mapping[str, Any]) -> Scheme:
    packing = str(config.get("packing_format") or "")
    if packing.endswith("gptq"):
        return _gptq(config)
    if packing.endswith("awq"):
        return _awq({**config, "zero_point": True})
    raise _unknown("packing_format", packing, "not GPTQ's nor AWQ's")


def _mxfp4(config: Mapping[str, Any]) -> Scheme:
    """Two numbers in a byte and a byte for each 32, `scales`; the experts alone."""
    return Scheme(4, 32, scale_bytes=1, experts_only=True)


def _bitsandbytes(config: Mapping[str, Any]) -> Scheme:
    """8 bits: a float32 a row, `SCB`. 4 bits: 64 numbers share `absmax`, quantized itself where asked for."""
    if config.get("load_in_8bit"):
        return Scheme(8, None, scale_bytes=4)
    if not config.get("load_in_4bit"):
        raise _unknown("load_in_4bit", config.get("load_in_4bit"), "neither 4 bits nor 8")
    twice = bool(config.get("bnb_4bit_use_double_quant"))  # a byte, and a float32 for each 256 of them
    return Scheme(4, 64, scale_bytes=1 + 4 / 256 if twice else 4, matrix_bytes=160)  # quant_map and quant_state


_READERS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: Scheme(8, None, scale_bytes=4),
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}
_GROUPED = ("compressed-tensors", "modelopt")


# --- methods that name groups of matrices


def _by_groups(config: Mapping[str, Any], method: str) -> Quantization:
    named = _names(config, "ignore")
    own: list[tuple[_Names, Scheme | None]] = []
    others: list[tuple[_Names, Scheme | None]] = []
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unknown("config_groups", groups, "no object that names groups of matrices")
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise _unknown(f"config_groups.{name}", group, "no object")
        weights, targets = group.get("weights"), _names(group, "targets")
        format = str(group.get("format") or config.get("format") or "")
        scheme = None if weights is None else _grouped(f"config_groups.{name}", weights, format)
        own.append((_Names([target for target in targets if target != "Linear"]), scheme))
        if "Linear" in targets:
            others.append((_Names(["*"]), scheme))
    return Quantization(method, ((_Names(named), None), *own, *others), named, output=True)


def _grouped(field: str, weights: Any, format: str) -> Scheme:
    """`weight_packed` or `weight`, `weight_scale` in the model's dtype, and zero points where it is not symmetric."""
    if not isinstance(weights, Mapping):
        raise _unknown(field, weights, "no object")
    bits, kind = _integer(weights, "num_bits"), weights.get("type", "int")
    size = None if weights.get("group_size") is None else _integer(weights, "group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "group")
    if bits == 4 and kind == "float" and strategy in ("group", "tensor_group") and size is not None:
        return Scheme(4, _group(size), scale_bytes=1, matrix_bytes=8)  # NVFP4: fp8 scales, and float32 ones for all
    zeros = 0 if weights.get("symmetric", True) else bits
    matrix = 16 if format == "pack-quantized" else 0  # weight_shape, two int64
    if strategy == "tensor":
        return Scheme(bits, 0, matrix_bytes=4 + matrix)
    if strategy == "channel":
        return Scheme(bits, None, zero_bits=zeros, matrix_bytes=matrix)
    if strategy == "group" and size is not None:
        return Scheme(bits, _group(size), zero_bits=zeros, matrix_bytes=matrix)
    if strategy == "block":
        rows, columns = _block(weights, "block_structure")
        return Scheme(bits, columns, rows=rows, matrix_bytes=matrix)
    raise _unknown(f"{field}.strategy", strategy, "how its scales lie is not known here")


# --- names

_OUTERMOST = ("model.", "language_model.", "text_model.")


class _Names:
    """Names of modules, as a `quantization_config` writes them.

    A name means the modules that have it as a whole part of their path; a glob or "re:", those whose path it matches
    from the beginning. Outermost prefixes, which differ between checkpoints and transformers, are ignored.

    Raises:
        UnknownModel: no regular expression after "re:".
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.parts: list[str] = []
        patterns = []
        for name in names:
            if name.startswith("re:"):
                patterns.append(rf"^\.(?:{name[3:]})")
            elif "*" in name:
                patterns.append(rf"^\.{'.*'.join(map(re.escape, _inner(name).split('*')))}(?:\..*)?\.$")
            else:
                self.parts.append(f".{_inner(name)}.")
        try:
            self.pattern = re.compile("|".join(patterns), re.MULTILINE) if patterns else None
        except re.error as error:
            raise _unknown("ignore", patterns, f"no regular expression ({error})") from None

    def mean(self, lines: str) -> bool:
        """Whether one of them means a module of these `_lines`."""
        if any(part in lines for part in self.parts):
            return True
        return self.pattern is not None and self.pattern.search(lines) is not None


def _lines(names: Iterable[str]) -> str:
    """Each name between dots, in full and without its outermost prefixes."""
    return "\n".join(f".{line}." for name in names for line in dict.fromkeys((name, _inner(name))))


def _inner(name: str) -> str:
    while name.startswith(_OUTERMOST):
        name = name.partition(".")[2]
    return name
