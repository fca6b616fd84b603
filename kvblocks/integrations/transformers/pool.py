"""Pool: engine and manager of one model, for as many calls and caches as there are.

Imports torch and transformers.
"""

import weakref
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvblocks.engine import CacheEngine
from kvblocks.integrations.transformers.cached import served
from kvblocks.integrations.transformers.layers import cache_groups, filling, kv_shape, one_block, text_config
from kvblocks.manager import BlockManager

__all__ = ["Pool"]


class Pool:
    """The blocks of one model, allocated once: what one call computes, the next ones find.

    Args:
        model: a transformers model, or its config; a config names no device, and says less about shapes.
        memory: for K and V, in bytes or like "64MiB", "1.5GB" (the default: "64MiB").
        num_blocks: blocks in the pool, instead of `memory`.
        block_size, layout: of the cache.
        dtype, device: of K and V; by default the model's. Of a config its dtype, else torch's default, on CPU.
        watermark: share of the pool that an admission leaves free, for those who run to grow into.
        chunks: whether layers that attend in chunks (Llama 4) keep no more than their chunk, where the model's layers
            read the blocks. That takes fewer blocks, and no `PagedCache` can use the pool then.

    Attributes:
        config: the sizes.
        engine: where K and V lie.
        manager: whose sequences all calls and caches hold.

    What `kvblocks.generate` computes is found by `kvblocks.generate`, and what `PagedCache` computes by `PagedCache`:
    some models hand their cache other K and V than their attention, so the two share room and not blocks.

    Raises:
        UnsupportedModel: the model cannot be served.
        ValueError, TypeError: an argument that cannot be.
        OutOfMemory: the memory is not there.

    Example:
        >>> pool = kvblocks.Pool(model, memory="1GiB")
        >>> for turn in chat:  # each computes only what is new
        ...     [stream] = kvblocks.generate(model, [turn], pool=pool)

    Thread-safety: one thread at a time drives what runs on a pool.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        *,
        memory: int | str | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        layout: str = "NHD",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        watermark: float = 0.01,
        chunks: bool = False,
    ) -> None:
        if memory is not None and num_blocks is not None:
            raise ValueError(f"memory={memory!r} and num_blocks={num_blocks} both say how large the pool is; give one")
        if not isinstance(model, PreTrainedConfig):
            paged = served(model)
            model = paged.model
            shape = paged.measure()
            dtype, device = dtype or model.dtype, device or model.device
            chunks = chunks and paged.attends_in_blocks
        else:
            shape = kv_shape(model)
            likely = getattr(text_config(model), "dtype", None) or getattr(model, "dtype", None)
            dtype = dtype or (likely if isinstance(likely, torch.dtype) else torch.get_default_dtype())
            device = device or "cpu"
        self._of: weakref.ref[Any] = weakref.ref(model)
        # Else chunked layers keep windows: `PagedCache` does not know where a padded row's chunks begin.
        one = one_block(shape, block_size, cache_groups(_config(model), chunks=chunks))
        if num_blocks is None:
            self.config = filling(one, "64MiB" if memory is None else memory, dtype)
        else:
            self.config = one.replace(num_gpu_blocks=num_blocks)
        self.engine = CacheEngine(self.config, dtype, device, layout=layout)
        self.manager = BlockManager.for_config(self.config, watermark=watermark)

    def check(self, model: PreTrainedModel | PreTrainedConfig) -> None:
        """Raise `ValueError` unless this is the pool of that model: another one's K and V would be found.

        The pool of a config becomes that of the first model with this config.
        """
        owner = self._of()
        both = isinstance(owner, PreTrainedModel) and isinstance(model, PreTrainedModel)
        if owner is not model and (both or _config(owner) is not _config(model)):
            name = type(owner).__name__ if owner is not None else "model that is gone"
            raise ValueError(
                f"the pool was made for another model, a {name}; its K and V would be taken for this "
                f"{type(model).__name__}'s. Make a pool for each model"
            )
        if not isinstance(model, PreTrainedModel):
            return
        if not isinstance(owner, PreTrainedModel):
            self._of = weakref.ref(model)
        if (model.dtype, model.device) != (self.engine.dtype, self.engine.device):
            raise ValueError(
                f"the model is {model.dtype} on {model.device}, and the pool {self.engine.dtype} on "
                f"{self.engine.device}; make the pool when the model is where it stays"
            )

    def reset_prefix_cache(self) -> None:
        """For new weights: let nothing that was computed so far be found again.

        Call it while no request runs; `Generation.reset_prefix_cache` is for one that does.
        """
        self.manager.reset_prefix_cache()

    def __repr__(self) -> str:
        free = self.manager.num_free_blocks
        return f"Pool(num_blocks={self.config.num_gpu_blocks}, free={free}, memory_bytes={self.engine.memory_bytes})"


def _config(model: Any) -> Any:
    return model.config if isinstance(model, PreTrainedModel) else model
