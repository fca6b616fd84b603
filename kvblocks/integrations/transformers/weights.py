"""What a model's weights and settings are, in a few digits: for the names under which processes share its blocks.

Imports torch and transformers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["adapter_digest", "file_version", "model_name", "state_version"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_CHUNK = 16 << 20


def file_version(folder: str | Path) -> str | None:
    """The sha256 of the weight files in a folder, by name and content; None where it has none."""
    files = sorted({file for pattern in _WEIGHTS for file in Path(folder).glob(pattern)})
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            own = hashlib.file_digest(stream, "sha256")
        found.update(f"{file.name}:".encode() + own.digest())
    return found.hexdigest() if files else None


def state_version(model: torch.nn.Module) -> str:
    """The sha256 of a model's state dict: of each tensor its name, dtype, shape and bytes."""
    return _digest(model.state_dict())


def adapter_digest(model: torch.nn.Module) -> bytes:
    """The sha256 of the weights of all adapters, which are told apart by name otherwise; 32 bytes, b"" for none."""
    found = {}
    for name, part in model.named_modules():
        if hasattr(part, "base_layer") and hasattr(part, "active_adapters"):
            for below, weight in part.named_parameters():
                if not below.startswith("base_layer."):
                    found[f"{name}.{below}"] = weight
    return bytes.fromhex(_digest(found)) if found else b""


def model_name(model: PreTrainedModel | PreTrainedConfig) -> str:
    """A name for what a model computes, its weights aside: the class, and a digest of its config."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    settings = _plain(config.to_dict())
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{config.model_type}-{hashlib.sha256(text.encode()).hexdigest()}"


def _plain(settings: Any) -> Any:
    """Settings without what says where a model came from, or who wrote it down."""
    if not isinstance(settings, dict):
        return settings
    left_out = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {k: _plain(v) for k, v in settings.items() if not str(k).startswith("_") and k not in left_out}


def _digest(tensors: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):  # what a module adds to its state besides
            found.update(f"{name}={tensor!r};".encode())
            continue
        tensor = tensor.detach()
        found.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        flat = (
            tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
        )
        for start in range(0, len(flat), _CHUNK):
            found.update(flat[start : start + _CHUNK].cpu().numpy().data)
    return found.hexdigest()
