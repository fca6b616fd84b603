"""The names under which a model's blocks are shared: the namespace of an engine, and the shard of a rank.

Imports the format of objects and, for types alone, the engine.
"""

from typing import TYPE_CHECKING

from kvblocks.tiers.objects import namespace

if TYPE_CHECKING:
    from kvblocks.engine import CacheEngine

__all__ = ["PRIVATE_SALT", "namespace_of", "shard_name"]

# What begins the salts of sequences whose blocks mean nothing outside of this process: they are never stored.
PRIVATE_SALT = b"kvblocks private:"


def namespace_of(engine: "CacheEngine", *, model: str, weights_version: str) -> str:
    """The namespace of an engine's blocks, for `Tiers`: all that decides what their bytes mean, as 64 hex digits.

    Processes share blocks where the model, the weights and all sizes of the cache but the number of blocks are equal.

    Args:
        engine: whose layers, layer groups, dtype, layout and block size count.
        model: a name for the model, equal wherever it is to be the same.
        weights_version: what changes whenever the weights do, such as the sha256 of their files. Blocks of other
            weights that are found under an old version are served as if they were right.

    Raises:
        ValueError: `model` or `weights_version` is empty.
        TypeError: one of them is no text.
    """
    for name, value in (("model", model), ("weights_version", weights_version)):
        if not isinstance(value, str):
            raise TypeError(f"{name} is a {type(value).__name__}; give text")
        if not value:
            raise ValueError(f"{name} is empty; give what no other model, and no other weights, have")
    config = engine.config
    dtype = str(engine.dtype).removeprefix("torch.")
    return namespace(
        model=model,
        weights_version=weights_version,
        dtype=dtype,
        codec="none",
        block_size=config.block_size,
        layers=[[(t.name, t.shape, str(t.dtype or dtype), t.per) for t in layer] for layer in config.layers],
        groups=[
            (None if group.reach is None else (type(group.reach).__name__, group.reach.size), group.layers)
            for group in config.groups
        ],
        layout=engine.layout,
    )


def shard_name(*, layers: range | None = None, heads: range | None = None) -> str:
    """The shard of a rank that holds a part of a model, for `Tiers`: "all", or such as "l0-15.h4-7".

    Args:
        layers, heads: of the whole model, those that the rank holds, one after the other; None for all.

    Raises:
        ValueError: a range that is empty, has a step other than 1, or begins below 0.
    """
    parts = []
    for letter, name, part in (("l", "layers", layers), ("h", "heads", heads)):
        if part is not None:
            if not part or part.step != 1 or part.start < 0:
                raise ValueError(f"{name}={part} must be one or more in a row, from 0 on")
            parts.append(f"{letter}{part.start}-{part.stop - 1}")
    return ".".join(parts) or "all"
