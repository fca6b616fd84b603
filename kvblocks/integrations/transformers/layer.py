"""The layers of a `PagedCache`: K and V of a pass go into blocks, and those of all columns come out.

Imports transformers.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvblocks.engine import CacheEngine
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.layers import ModelLayer, text_config
from kvblocks.integrations.transformers.passes import Pass
from kvblocks.integrations.transformers.rows import Rows
from kvblocks.storage.cache import PagedKVCache

__all__ = ["CacheState", "LayerState", "PagedLayer", "check_states", "exchange"]

_TAKES_VIEWS = {"gpt_neox_japanese"}  # model types that call `view` on K, which must be without gaps then


class LayerState(Protocol):
    """What the layers of one cache have in common, as far as a layer asks."""

    recording: bool

    def length(self, layer: ModelLayer) -> int:
        """Columns that the layer has."""

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write K and V of new columns; returns those of all columns that the layer reaches."""


class CacheState:
    """What the cache and its layers have in common. It does not refer to the cache, which is free to go."""

    def __init__(self, config: PreTrainedConfig, rows: Rows, num_layers: int) -> None:
        self.config = config
        self.rows = rows
        self.num_layers = num_layers

    def settled(self, what: str) -> Rows:
        """The rows, unless a pass is half done."""
        if self.rows.running is not None:
            raise RuntimeError(f"{what} was called inside a pass, {self._how_far(self.rows.running)}")
        return self.rows

    def select(self, what: str, indices: Sequence[int]) -> None:
        rows = self.settled(what)
        held = len(rows.rows) * rows.factor
        if not indices or not all(0 <= index < held for index in indices):
            raise ValueError(f"{what} names rows {list(indices)}; the cache holds rows 0 to {held - 1}")
        rows.select([index // rows.factor for index in indices])

    def length(self, layer: ModelLayer) -> int:
        """Columns that the layer has, those of a running pass included once it has written them."""
        run = self.rows.running
        return self.rows.columns + (run.count if run is not None and layer.index in run.written else 0)

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write K and V of the new columns; returns those of all columns that the layer reaches."""
        rows, run = self.rows, self.rows.running
        if run is not None and (run.dropped or layer.index in run.written):
            raise RuntimeError(
                f"layer {layer.index} begins a pass, but the one before has not ended: {self._how_far(run)}"
            )
        try:
            check_states(layer, keys, values)
            if run is None:
                run = rows.open(keys.shape[0], keys.shape[2], keys.device)
            elif (run.batch, run.count) != (keys.shape[0], keys.shape[2]):
                raise UnsupportedModel(
                    f"layer {layer.index} adds {keys.shape[2]} columns to {keys.shape[0]} rows, the layers before it "
                    f"{run.count} to {run.batch}; all layers must add the same"
                )
            if run.factor > 1 and not run.written:
                _check_copies(keys, run.factor, len(rows.rows))
            kept = keys.dtype
            if torch.is_autocast_enabled(keys.device.type):
                kept = rows.blocks.dtype_of(torch.promote_types(keys.dtype, values.dtype))
            shape = (keys.shape[1], keys.shape[3], values.shape[3])
            engine = rows.blocks.engine(shape, kept, keys.device)
            read = exchange(self.config, engine, run, layer, keys, values)
        except BaseException:
            rows.abort()
            raise
        run.written.add(layer.index)
        if len(run.written) == self.num_layers:
            rows.finish()
        return read

    @property
    def recording(self) -> bool:
        """Whether passes may be cut by `crop`, however far their windows moved on."""
        return self.rows.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self.rows.recording = value

    def _how_far(self, run: Pass) -> str:
        if run.dropped:
            return "another cache on the same blocks began one meanwhile. Call abort() to go on from the pass before it"
        return (
            f"{len(run.written)} of {self.num_layers} layers have written. If it failed, call abort(); if these are "
            "all that ever write, the model cannot be served"
        )


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer, as transformers asks for it."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, state: LayerState, layer: ModelLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state
        self._layer = layer
        self.is_sliding = layer.window is not None
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        raise UnsupportedModel(f"layer {self._layer.index}: the model reads K and V past `update`; they lie in blocks")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """There are none; transformers' own constructor sets None."""

    values = keys

    def __repr__(self) -> str:
        return f"layer {self._layer.index} over blocks"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pool is allocated whole."""

    @property
    def record_past(self) -> bool:
        return self._state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._state.recording = value

    @torch.compiler.disable  # type: ignore[untyped-decorator] # it knows tensors by address, and a trace has none
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._state.update(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._state.length(self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that `update` will return, and the number of the first."""
        columns, window = self.get_seq_length(), self._layer.window
        first = 0 if window is None else max(0, columns - window + 1)
        return columns - first + query_length, first

    def get_max_length(self) -> int:
        return -1 if self._layer.window is None else self._layer.window


def exchange(
    config: PreTrainedConfig, engine: CacheEngine, run: Pass, layer: ModelLayer, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Write K and V [rows, heads, new columns, dim] into the blocks; returns those of all columns within reach.

    Under autocast they are kept in the engine's dtype, and returned in the one that they came in.
    """
    shape = (keys.shape[1], keys.shape[3], values.shape[3])
    dtypes = keys.dtype, values.dtype
    mixed = torch.is_autocast_enabled(keys.device.type)
    storage = layer.storage or 0
    cache, group = engine[storage], engine.group_of(storage)
    if mixed:
        keys, values = keys.to(engine.dtype), values.to(engine.dtype)
    _check_fit(layer, keys, shape, cache)
    _write(cache, run, group, keys, values)
    read = _read(cache, run, group, layer.window, shape)
    if mixed:
        read = read[0].to(dtypes[0]), read[1].to(dtypes[1])
    if text_config(config).model_type in _TAKES_VIEWS:
        read = read[0].contiguous(), read[1].contiguous()
    return read


def check_states(layer: ModelLayer, keys: Tensor, values: Tensor) -> None:
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3] or not keys.shape[0]:
        raise UnsupportedModel(
            f"layer {layer.index} makes K {list(keys.shape)} and V {list(values.shape)}; served are [rows, heads, "
            "tokens, dim], alike but for dim"
        )
    if keys.requires_grad or values.requires_grad:
        raise RuntimeError("K and V in blocks take part in no gradient; run the model under torch.inference_mode()")


def _check_copies(keys: Tensor, factor: int, rows: int) -> None:
    """Stop a batch of other prompts than the told ones: rows that were expanded have the same K but for rounding."""
    copies = keys.reshape(rows, factor, *keys.shape[1:])
    scale = copies.abs().amax()
    if ((copies[:, 1:] - copies[:, :1]).abs().amax() > 0.02 * scale).item():
        raise ValueError(
            f"the batch has {len(keys)} rows and begin was told {rows} prompts, but rows that stand for one prompt "
            "differ; tell begin the prompt of every row"
        )


def _check_fit(layer: ModelLayer, keys: Tensor, shape: tuple[int, int, int], cache: PagedKVCache) -> None:
    holds = (cache.num_heads, cache.head_dim, cache.v_head_dim)
    if any(size > most for size, most in zip(shape, holds, strict=True)):
        raise UnsupportedModel(
            f"layer {layer.index} makes {shape[0]} heads of K [{shape[1]}] and V [{shape[2]}], the cache holds "
            f"{holds[0]} of [{holds[1]}] and [{holds[2]}], as the config and the layers before have it"
        )
    if keys.dtype != cache.dtype or keys.device != cache.device:
        raise ValueError(
            f"the model makes {keys.dtype} on {keys.device}, the cache holds {cache.dtype} on {cache.device}; give "
            "PagedCache the model's dtype and device"
        )


def _write(cache: PagedKVCache, run: Pass, group: int, keys: Tensor, values: Tensor) -> None:
    sides = []
    for states, dim in ((keys, cache.head_dim), (values, cache.v_head_dim)):
        rows = states[:: run.factor].transpose(1, 2).flatten(0, 1)
        if run.chosen is not None:
            rows = rows[run.chosen]
        if rows.shape[1:] != (cache.num_heads, dim):
            rows = pad(rows, (0, dim - rows.shape[2], 0, cache.num_heads - rows.shape[1]))
        sides.append(rows)
    cache.write(sides[0], sides[1], run.slots[group])


def _read(
    cache: PagedKVCache, run: Pass, group: int, window: int | None, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """K and V [rows, heads, columns, dim] of the columns within reach; zeros where there is padding."""
    after = run.before + run.count
    first = 0 if window is None else max(0, run.before - window + 1)
    skipped = 0 if run.gathered_at is not None else first // cache.block_size
    tables = run.tables[group, :, skipped:]
    length = tables.shape[1] * cache.block_size
    start, stop = first - skipped * cache.block_size, after - skipped * cache.block_size
    unpadded = len(tables) == 1 and run.gathered_at is None
    sides = cache.gather(tables.flatten(), stop if unpadded else len(tables) * length)
    result = []
    for side, dim in zip(sides, shape[1:], strict=True):
        if run.gathered_at is None or run.padding is None:
            rows = side.view(len(tables), -1, *side.shape[1:])[:, start:stop]
        else:
            rows = side[run.gathered_at[:, first:]]
            rows.masked_fill_(run.padding[:, first:, None, None], 0)
        rows = rows[:, :, : shape[0], :dim]
        if run.factor > 1:
            rows = rows.repeat_interleave(run.factor, 0)
        result.append(rows.transpose(1, 2))
    return result[0], result[1]
