"""Bytes of a model's weights as its checkpoint holds them: from safetensors headers and their index. No torch.

A safetensors file begins with 8 bytes, the length of a JSON header in little-endian, and the header gives each tensor's
first and last byte (https://huggingface.co/docs/safetensors). What is quantized is counted as it is stored.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblocks.models.hub import HubModel

if TYPE_CHECKING:
    from kvblocks.models.gguf_file import GgufFile

__all__ = ["SEES", "Checkpoint", "checkpoint_of", "predicts_ahead"]

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # the format's own bound
_AHEAD = re.compile(r"(^|\.)(mtp|nextn)\w*\.")
SEES = ("vision", "visual", "audio", "encoder")  # in names of what is not the text half
_NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        total: bytes of all its tensors.
        ahead: of them, those of layers for multi-token prediction; None where only the total is known.
        source: where the bytes were read, for the reader.
    """

    total: int
    ahead: int | None
    source: str


def checkpoint_of(origin: "Path | HubModel | GgufFile", layers: int) -> Checkpoint | None:
    """The checkpoint in a folder, on the hub or in a GGUF file; None where there are no safetensors.

    Args:
        origin: the folder that holds the config, the model on the hub, or a GGUF file.
        layers: of the model; tensors of later ones predict several tokens ahead.

    Raises:
        ValueError: a file that is no safetensors file, or an index that is none.
        FileNotFoundError: the hub cannot be reached.
    """
    if isinstance(origin, Path):
        return _in_folder(origin, layers)
    if not isinstance(origin, HubModel):
        return Checkpoint(origin.weight_bytes(), 0, origin.path.name)
    cached = None if origin.folder is None else _in_folder(origin.folder, layers)
    if cached is not None:
        return cached
    if origin.has(_INDEX):
        index = _json(origin.file(_INDEX))
        total = _total_size(index)
        if total is not None:
            return Checkpoint(total, None, _INDEX)
        return _summed(map(origin.tensor_bytes, _shards(index)), layers, "safetensors headers")
    if origin.has(_WHOLE):
        return _summed([origin.tensor_bytes(_WHOLE)], layers, "the safetensors header")
    return None


def _in_folder(folder: Path, layers: int) -> Checkpoint | None:
    index_file = folder / _INDEX
    if index_file.is_file():
        index = _json(index_file)
        shards = [folder / name for name in _shards(index)]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if not missing:
            return _summed(map(_tensor_bytes, shards), layers, "safetensors headers")
        total = _total_size(index)
        if total is None:
            raise ValueError(f"{index_file} gives no metadata.total_size, and {missing[0]} is not beside it")
        return Checkpoint(total, None, _INDEX)
    if (folder / _WHOLE).is_file():  # what else lies there, as an adapter, is not of the model's own
        return _summed([_tensor_bytes(folder / _WHOLE)], layers, "safetensors headers")
    files = sorted(folder.glob("*.safetensors"))
    # Mistral puts the same weights beside each other under both names.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    return _summed(map(_tensor_bytes, files), layers, "safetensors headers") if files else None


def _summed(files: Iterable[Mapping[str, int]], layers: int, source: str) -> Checkpoint:
    total = ahead = 0
    for file in files:
        total += sum(file.values())
        ahead += sum(size for name, size in file.items() if predicts_ahead(name, layers))
    return Checkpoint(total, ahead, source)


def predicts_ahead(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer for multi-token prediction: by its name, or of a layer after the last."""
    if _AHEAD.search(name):
        return True
    numbered = _NUMBERED.search(name)
    sees = any(part in name for part in SEES)
    return numbered is not None and not sees and int(numbered[1]) >= layers


def _tensor_bytes(file: Path) -> dict[str, int]:
    """Bytes of every tensor in a file, of which only the header is read."""
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
        if start == _POINTER:
            raise ValueError(f"{file} is the pointer of Git LFS to the file; run git lfs pull, or give the bytes")
        length = int.from_bytes(start[:8], "little")
        opened.seek(8)
        if not 2 <= length <= min(_LONGEST_HEADER, file.stat().st_size - 8):
            raise ValueError(f"{file} is no safetensors file: a header of {length} bytes")
        header = _parsed(opened.read(length), file)
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    sizes = {name: _span(tensor, name, file) for name, tensor in tensors.items()}
    there, needed = file.stat().st_size, 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
    if there < needed:
        raise ValueError(f"{file} is cut off: it has {there:,} of the {needed:,} bytes that its header names")
    return sizes


def _span(tensor: Any, name: str, file: Path) -> int:
    """Bytes from a tensor's first to its last."""
    at = tensor.get("data_offsets") if isinstance(tensor, Mapping) else None
    if isinstance(at, list) and len(at) == 2 and all(type(end) is int for end in at) and 0 <= at[0] <= at[1]:
        return int(at[1] - at[0])
    raise ValueError(f"{file} is no safetensors file: {name!r:.60} has data_offsets={at!r:.60}")


def _shards(index: Mapping[str, Any]) -> list[str]:
    names = index.get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{_INDEX} has no weight_map of tensors to files")
    outside = next((name for name in names.values() if name in ("", "..") or "/" in name), None)
    if outside is not None:
        raise ValueError(f"{_INDEX} names the file {outside!r:.60}, which is not beside it")
    return sorted(set(names.values()))


def _total_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    # Some writers give it as a float.
    return int(total) if isinstance(total, int | float) and not isinstance(total, bool) and total > 0 else None


def _json(file: Path) -> dict[str, Any]:
    return _parsed(file.read_bytes(), file)


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON, no text, a number past what Python reads, or nested too deep
        raise ValueError(f"{file} does not hold JSON where it must: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__} where an object must be")
    return found
