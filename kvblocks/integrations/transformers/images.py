"""Images in the inputs of a prompt: which columns each takes, what tells it from others, and inputs without them.

Knows no cache. Imports torch.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvblocks.integrations.transformers.layers import placeholder_tokens

__all__ = ["Image", "images_of", "positions_of", "runs_of", "without_images"]

_TAKEN = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class Image:
    """One image of a batch: columns [first, end) of a row, and the digest of its pixels."""

    row: int
    first: int
    end: int
    digest: bytes


def images_of(config: PreTrainedConfig, ids: npt.NDArray[np.int64], inputs: Mapping[str, Any]) -> list[Image]:
    """The images of ids [rows, columns] in the order of their pixels: row by row, from the left.

    Args:
        config: of the model.
        ids: of the prompts, padding included.
        inputs: what the processor made: `pixel_values` [images, channels, height, width], of which each image takes as
            many columns, or [patches, values] with `image_grid_thw` [images, 3] (Qwen2-VL).

    Raises:
        ValueError: an input that is none of an image's, or columns and pixels that do not fit each other.
    """
    for name, value in inputs.items():
        if name not in _TAKEN and value is not None:
            raise ValueError(f"inputs has {name}; taken are {', '.join(sorted(_TAKEN))}. For others use begin")
    names = placeholder_tokens(config)
    tokens = [token for token, name in names.items() if name.startswith("image")]
    others = sorted((names.keys() - set(tokens)) & set(ids.ravel().tolist()))
    if others:
        raise ValueError(f"input_ids holds {others[0]}, the config's {names[others[0]]}; taken are images")
    rows, columns = np.nonzero(np.isin(ids, tokens))
    pixels: Tensor | None = inputs.get("pixel_values")
    grid: Tensor | None = inputs.get("image_grid_thw")
    if pixels is None:
        if len(columns):
            raise ValueError(f"input_ids holds {len(columns)} placeholders of images, and there are no pixel_values")
        return []
    sizes, parts = _sizes(config, pixels, grid, len(columns))
    if sum(sizes) != len(columns):
        raise ValueError(f"input_ids holds {len(columns)} placeholders, and the pixels take {sum(sizes)}")
    images, at = [], 0
    for number, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        row, first, last = int(rows[at]), int(columns[at]), int(columns[at + size - 1])
        if int(rows[at + size - 1]) != row or last - first != size - 1:
            raise ValueError(f"the {size} placeholders of image {number} do not follow each other in one row")
        digest = hashlib.sha256(
            repr((part.dtype, tuple(part.shape), None if grid is None else grid[number].tolist())).encode()
        )
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        images.append(Image(row, first, last + 1, digest.digest()))
        at += size
    return images


def _sizes(config: Any, pixels: Tensor, grid: Tensor | None, placeholders: int) -> tuple[list[int], Sequence[Tensor]]:
    """Columns of each image, and its pixels."""
    if grid is not None:
        merged = config.vision_config.spatial_merge_size**2
        patches = [math.prod(line) for line in grid.tolist()]
        if sum(patches) != len(pixels):
            raise ValueError(f"image_grid_thw has {sum(patches)} patches, pixel_values {len(pixels)}")
        return [count // merged for count in patches], torch.split(pixels, patches)
    if pixels.ndim != 4 or not len(pixels) or placeholders % len(pixels):
        raise ValueError(
            f"pixel_values has shape {list(pixels.shape)}, and input_ids {placeholders} placeholders; taken are "
            "[images, channels, height, width], each image with as many placeholders"
        )
    return [placeholders // len(pixels)] * len(pixels), list(pixels)


def without_images(inputs: Mapping[str, Any], images: Sequence[Image], columns: int) -> dict[str, Any]:
    """Inputs without the pixels of the images that end within the first `columns` columns."""
    left = [number for number, image in enumerate(images) if image.end > columns]
    made = {name: value for name, value in inputs.items() if value is not None}
    if len(left) == len(images):
        return made
    pixels, grid = made.pop("pixel_values"), made.pop("image_grid_thw", None)
    if not left:
        return made
    if grid is None:
        return {**made, "pixel_values": pixels[left]}
    parts = torch.split(pixels, [math.prod(line) for line in grid.tolist()])
    return {**made, "pixel_values": torch.cat([parts[number] for number in left]), "image_grid_thw": grid[left]}


def positions_of(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
    """The position ids of a model with M-RoPE, int64 [4, rows, columns]: of text, then time, height and width."""
    text = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    parts = text[None].expand(3, -1, -1)
    if inputs.get("image_grid_thw") is not None:
        home: Any = next(part for part in model.modules() if hasattr(part, "get_rope_index"))
        taken = ("image_grid_thw", "mm_token_type_ids")
        parts, _ = home.get_rope_index(ids, attention_mask=mask, **{name: inputs[name] for name in taken})
    return torch.cat([text[None], parts.to(text)])


def runs_of(config: PreTrainedConfig, ids: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The half-open ranges of ids [tokens] in which placeholders follow each other."""
    placeholders = np.isin(ids, list(placeholder_tokens(config)))
    edges = np.flatnonzero(np.diff(placeholders.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
