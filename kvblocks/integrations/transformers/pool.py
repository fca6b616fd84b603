"""Pool: engine and manager of one model, for as many calls and caches as there are.

Imports torch and transformers.
"""

import time
import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvblocks.config import CacheConfig
from kvblocks.engine import CacheEngine
from kvblocks.integrations.transformers.backend import PagedModel, adapters
from kvblocks.integrations.transformers.blocks import Blocks
from kvblocks.integrations.transformers.cached import CachedModel, served
from kvblocks.integrations.transformers.layers import (
    cache_groups,
    checkpoints_every,
    filling,
    host_memory_beside,
    host_slots,
    kv_shape,
    one_block,
    slots_beside,
    text_config,
)
from kvblocks.integrations.transformers.weights import adapter_digest, model_name
from kvblocks.manager import BlockManager
from kvblocks.sizes import checked_size
from kvblocks.tiers import Store, Tiers
from kvblocks.tiers.names import namespace_of

__all__ = ["Pool", "check_pool"]


class Pool:
    """The blocks of one model, allocated once: what one call computes, the next ones find.

    Args:
        model: a transformers model, or its config; a config names no device, and says less about shapes.
        memory: for K and V, and for states, in bytes or like "64MiB", "1.5GB" (the default: "64MiB").
        num_blocks: blocks in the pool, instead of `memory`, which counts no states.
        num_states: slots for states, where layers keep some (linear attention, Mamba, convolutions): one for each
            sequence that runs, and one for each checkpoint, from which later prompts and preempted sequences go on.
            By default there are as many as any use of the pool may need: one for each `state_every` tokens that the
            memory could hold, and 64 more, in a quarter of the memory at most, but at least 2; with `num_blocks` in a
            third of what the blocks take. Where you know how many sequences will run, give a number:
            `kvblocks.plan(...).num_states` is one for each that runs and one for its newest checkpoint.
        state_every: tokens from one possible checkpoint to the next, a multiple of `block_size`; by default 256.
        block_size, layout: of the cache.
        host_memory: for blocks that the pool has no more room for, and checkpoints with them, in bytes or like "1GiB";
            by default none. What is about to be evicted is copied there, and comes back when it is asked for again.
        dtype, device: of K and V; by default the model's. Of a config its dtype, else torch's default, on CPU.
        watermark: share of the pool that an admission leaves free, for those who run to grow into.
        chunks: whether layers that attend in chunks (Llama 4) keep no more than their chunk, where the model's layers
            read the blocks. That takes fewer blocks, and no `PagedCache` can use the pool then.
        stores: `kvblocks.tiers.Store` objects below host memory: what was computed goes there, and is found again by
            other pools and processes. They stay yours to close, after `close`. Without `host_memory` a quarter as much
            of it is taken as there is memory for K, V and states; prompts of up to a quarter of the slots are fetched
            whole.
        weights_version: with `stores`, and then without a default: what changes whenever the weights do, such as
            the sha256 of their files. K and V of other weights under an old version are served as if they were right.
        secret: with `stores`, at least 16 bytes: only who has it can make what is taken from them.
        deadline: with `stores`, seconds that a prompt waits for them at most.

    Attributes:
        blocks: what caches on this pool share.

    What `kvblocks.generate` has computed `PagedCache` finds, and the other way round. A few models hand their cache
    other K and V than their attention; there the two share room, and each finds its own blocks only.

    Of a model that keeps states, all that runs on the pool shares its slots. A generation waits for slots, or preempts,
    among its own sequences alone. Where others hold all slots, so that not one of its sequences gets any, its next
    token raises `NoFreeStates`. Nothing is lost: it goes on when it is asked again and a slot is free. So where several
    run by turns, `num_states` is for all of them. A `PagedCache` takes slots for checkpoints alone; where none is free
    it leaves none.

    Raises:
        UnsupportedModel: the model cannot be served.
        ValueError, TypeError: an argument that cannot be, or that is of states where the model keeps none.
        OutOfMemory: the memory is not there.

    Example:
        >>> pool = kvblocks.Pool(model, memory="1GiB")
        >>> for turn in chat:  # each computes only what is new
        ...     [stream] = kvblocks.generate(model, [turn], pool=pool)

        >>> store = DiskStore("/var/cache/kv", "100GiB")
        >>> with Pool(model, memory="1GiB", stores=[store], weights_version="2026-11-27") as pool:
        ...     kvblocks.generate(model, prompts, pool=pool).run()
        >>> store.close()

    Thread-safety: one thread at a time drives what runs on a pool.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig | PagedModel | CachedModel,
        *,
        memory: int | str | None = None,
        num_blocks: int | None = None,
        num_states: int | None = None,
        state_every: int | None = None,
        host_memory: int | str | None = None,
        block_size: int = 16,
        layout: str = "NHD",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        watermark: float = 0.01,
        chunks: bool = False,
        stores: Iterable[Store] = (),
        weights_version: str | None = None,
        secret: bytes | None = None,
        deadline: float = 5.0,
    ) -> None:
        if memory is not None and num_blocks is not None:
            raise ValueError(f"memory={memory!r} and num_blocks={num_blocks} both say how large the pool is; give one")
        below = list(stores)
        if below and weights_version is None:
            raise ValueError(
                "stores keep blocks for other processes, so weights_version must say of which weights they are; give "
                "what changes whenever the weights do"
            )
        if not below and (weights_version is not None or secret is not None):
            raise ValueError("weights_version and secret are for stores, and there are none")
        if not isinstance(model, PreTrainedConfig):
            paged = served(model)
            model = paged.model
            shape, states = paged.measure(), paged.states()
            dtype, device = dtype or model.dtype, device or model.device
            chunks = chunks and paged.attends_in_blocks
        else:
            shape, states = kv_shape(model), ()
            likely = getattr(text_config(model), "dtype", None) or getattr(model, "dtype", None)
            dtype = dtype or (likely if isinstance(likely, torch.dtype) else torch.get_default_dtype())
            device = device or "cpu"
        # Else chunked layers keep windows: `PagedCache` does not know where a padded row's chunks begin.
        one = one_block(shape, block_size, cache_groups(_config(model), chunks=chunks))
        every = checkpoints_every(block_size, state_every)
        if num_states is not None:
            checked_size("num_states", num_states)
        if not shape.states and (num_states is not None or state_every is not None):
            raise ValueError(f"num_states={num_states}, state_every={state_every}, but the model keeps no states")
        if num_blocks is None:
            memory = "64MiB" if memory is None else memory
            config, num_states = filling(one, memory, dtype, every=every, num_states=num_states)
        else:
            config = one.replace(num_gpu_blocks=num_blocks)
            if num_states is None:
                num_states = slots_beside(config, dtype, every)
        num_states = num_states or 0
        if below and host_memory is None:
            host_memory = host_memory_beside(config, num_states, dtype)
        slots, checkpoints = host_slots(config, host_memory, dtype, every, stores=bool(below))
        engine = CacheEngine(
            config,
            dtype,
            device,
            layout=layout,
            host_blocks=slots,
            num_states=num_states,
            host_states=checkpoints,
        )
        self._of: weakref.ref[Any] = weakref.ref(model)
        manager = BlockManager.for_config(
            config,
            watermark=watermark,
            host_blocks=slots,
            num_states=num_states,
            host_states=checkpoints,
            every=every,
        )
        self.blocks = Blocks.of(manager, engine)
        if states:
            self.blocks.slots_for(states)
        self._digests: tuple[Any, bytes] = (None, b"")
        if below and weights_version is not None:
            self._name = model_name(model)
            self.blocks.tiers = Tiers(
                self.manager,
                engine,
                below,
                namespace=namespace_of(engine, model=self._name, weights_version=weights_version),
                secret=secret,
                deadline=deadline,
            )

    @classmethod
    def over(cls, config: PreTrainedConfig, blocks: Blocks) -> Self:
        """The pool of a model's config over blocks that may not be allocated yet, as `PagedCache` makes it."""
        made = cls.__new__(cls)
        made._of = weakref.ref(config)
        made.blocks = blocks
        made._digests = (None, b"")
        return made

    @property
    def engine(self) -> CacheEngine:
        """Where K and V lie; allocated now, if a `PagedCache` made this pool and nothing has come yet."""
        return self.blocks.allocated()

    @property
    def manager(self) -> BlockManager:
        """Whose sequences all calls and caches hold."""
        return self.blocks.manager

    @property
    def config(self) -> CacheConfig:
        """The sizes of `engine`."""
        return self.engine.config

    @property
    def tiers(self) -> Tiers | None:
        """What moves blocks to and from `stores`."""
        return self.blocks.tiers

    def check(self, model: PreTrainedModel | PreTrainedConfig | PagedModel | CachedModel) -> None:
        """Raise `ValueError` unless this is the pool of that model: another one's K and V would be found.

        The pool of a config becomes that of the first model with this config, and is allocated for it if it is not yet.
        """
        paged: PagedModel | CachedModel | None = None
        if isinstance(model, PagedModel | CachedModel):
            paged, model = model, model.model
        elif not isinstance(model, PreTrainedConfig):
            paged = served(model)
            model = paged.model
        owner = self._of()
        both = isinstance(owner, PreTrainedModel) and paged is not None
        if owner is not model and (both or _config(owner) is not _config(model)):
            name = type(owner).__name__ if owner is not None else "model that is gone"
            raise ValueError(
                f"the pool was made for another model, a {name}; its K and V would be taken for this "
                f"{type(model).__name__}'s. Make a pool for each model"
            )
        if paged is None:
            return
        shape = paged.measure()
        if not self.blocks.is_allocated:
            self.blocks.engine(None if shape.layers else shape[1:4], paged.model.dtype, paged.model.device)
        if (paged.model.dtype, paged.model.device) != (self.engine.dtype, self.engine.device):
            raise ValueError(
                f"the model is {paged.model.dtype} on {paged.model.device}, and the pool {self.engine.dtype} on "
                f"{self.engine.device}; make the pool when the model is where it stays"
            )
        for layer, (tensors, kept) in enumerate(zip(shape.tensors, self.config.layers, strict=False)):
            made, held = (
                (*key.shape, value.shape[1], *(tensor.shape[1] for tensor in more))
                for key, value, *more in (tensors, kept)
            )
            if made[3:] != held[3:] or any(size > most for size, most in zip(made[:3], held[:3], strict=True)):
                raise ValueError(
                    f"layer {layer} of the model keeps (heads, dim of K, V and index keys) {made}, and the pool holds "
                    f"{held}; make the pool of the model, not of its config or in a PagedCache"
                )
        if paged.keeps_states:
            if not self.manager.num_states:
                raise ValueError(f"the pool has no slots for the states of this {type(model).__name__}; make one of it")
            self.blocks.slots_for(paged.states())
        if owner is not model:
            self._of = weakref.ref(model)

    def adapters(self) -> bytes:
        """Which adapters change the model's K and V now, for salts; empty where none does, or no model is known.

        With `stores` a digest of their weights is in it, as other processes may have others of these names.
        """
        owner = self._of()
        names = adapters(owner) if isinstance(owner, PreTrainedModel) else b""
        if not names or self.tiers is None:
            return names
        state = names, self.manager.num_resets
        if self._digests[0] != state:
            assert isinstance(owner, PreTrainedModel)
            self._digests = state, adapter_digest(owner)
        return names + self._digests[1]

    def reset_prefix_cache(self, *, weights_version: str | None = None) -> None:
        """For new weights: let nothing that was computed so far be found again.

        Call it while no request runs; `Generation.reset_prefix_cache` is for one that does.

        Args:
            weights_version: of the new weights. Without it `stores` are not used from here on, until `renew`.

        Raises:
            ValueError: as for `renew`; then the prefix cache has been reset all the same.
        """
        self.manager.reset_prefix_cache()
        if weights_version is not None:
            self.renew(weights_version)

    def renew(self, weights_version: str, *, same_weights: bool = False) -> None:
        """Use `stores` again after the prefix cache was reset.

        Args:
            weights_version: of the weights that the model has now.
            same_weights: the version may be the one of before.

        Raises:
            ValueError: there are no stores; or as for `Tiers.renew`.
        """
        if self.tiers is None:
            raise ValueError("the pool has no stores")
        name = namespace_of(self.engine, model=self._name, weights_version=weights_version)
        self.tiers.renew(name, same_weights=same_weights)

    def flush(self, timeout: float = 60.0) -> bool:
        """Bring what nothing holds down to `stores`; whether all is there, as for `Tiers.flush`. True without stores.

        Call it while nothing runs on the pool.
        """
        return self.tiers is None or self.tiers.flush(timeout)

    def close(self, timeout: float = 60.0) -> bool:
        """`flush`, then stop using `stores`, which may be closed if it returns True. A second call does nothing.

        Args:
            timeout: seconds. Calls of a store that hang longer keep their memory, and the store must not be closed.
        """
        if self.tiers is None:
            return True
        if not self.tiers.is_closed:
            end = time.monotonic() + timeout
            self.tiers.flush(timeout)
            timeout = max(1.0, end - time.monotonic())
        return self.tiers.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        free = self.manager.num_free_blocks
        return f"Pool(num_blocks={self.config.num_gpu_blocks}, free={free}, memory_bytes={self.engine.memory_bytes})"


def _config(model: Any) -> Any:
    return model.config if isinstance(model, PreTrainedModel) else model


def check_pool(pool: Any) -> Pool:
    """`pool`; raises `TypeError` where it is none."""
    if not isinstance(pool, Pool):
        raise TypeError(f"pool is a {type(pool).__name__}; give a kvblocks.Pool, as another cache or a Generation has")
    return pool
