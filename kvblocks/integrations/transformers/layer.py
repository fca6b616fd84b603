"""The layers of a `PagedCache`: K and V of a pass go into blocks, and those of all columns come out.

Imports transformers.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionLayer

from kvblocks.engine import CacheEngine
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.layers import ModelLayer, text_config
from kvblocks.integrations.transformers.passes import Pass
from kvblocks.integrations.transformers.rows import Rows
from kvblocks.integrations.transformers.states import States
from kvblocks.storage.cache import PagedKVCache

__all__ = [
    "CacheState",
    "LayerState",
    "PagedLayer",
    "StateLayer",
    "cache_layers",
    "check_index",
    "check_states",
    "exchange",
    "index",
]

_TAKES_VIEWS = {"gpt_neox_japanese"}  # model types that call `view` on K, which must be without gaps then


class LayerState(Protocol):
    """What the layers of one cache have in common, as far as a layer asks."""

    recording: bool

    def length(self, layer: ModelLayer) -> int:
        """Columns that the layer has."""

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write K and V of new columns; returns those of all columns that the layer reaches."""

    def index(self, layer: ModelLayer, keys: Tensor) -> Tensor:
        """Take index keys [rows, new columns, dim], whose K and V come next; returns those of all columns."""

    def enter(self, layer: ModelLayer, call: str) -> None:
        """The layer reads or writes what it keeps beside K and V; one that does so again is in another pass."""

    def check_batch(self, batch: int) -> None:
        """Raise where the pass cannot have so many rows."""


class CacheState:
    """What the cache and its layers have in common. It does not refer to the cache, which is free to go."""

    def __init__(self, config: PreTrainedConfig, rows: Rows, layers: Sequence[ModelLayer]) -> None:
        self.config = config
        self.rows = rows
        self.num_layers = sum(layer.writes for layer in layers)
        self.num_indexed = sum(layer.index_dim > 0 for layer in layers)

    def settled(self, what: str) -> Rows:
        """The rows, unless a pass is half done."""
        if not self.rows.settled():
            raise RuntimeError(f"{what} was called inside a pass, {self._how_far(self.rows.running)}")
        return self.rows

    def select(self, what: str, indices: Sequence[int]) -> None:
        rows = self.settled(what)
        held = len(rows.rows) * rows.factor
        if not indices or not all(0 <= index < held for index in indices):
            raise ValueError(f"{what} names rows {list(indices)}; the cache holds rows 0 to {held - 1}")
        states = rows.states.selected(indices)  # they are those of the batch, where rows may stand for several
        rows.select([index // rows.factor for index in indices])
        rows.states.hold(*states)

    def length(self, layer: ModelLayer) -> int:
        """Columns that the layer has, those of a running pass included once it has written them."""
        run = self.rows.running
        return self.rows.columns + (run.count if run is not None and layer.index in run.written else 0)

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write K and V of the new columns; returns those of all columns that the layer reaches."""
        self.enter(layer, "update")
        rows, run = self.rows, self.rows.running
        if run is not None and (run.dropped or layer.index in run.written):
            raise self._not_ended(layer)
        try:
            check_states(layer, keys, values)
            run = self._opened(layer, keys.shape[0], keys.shape[2], keys.device)
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
        self._finish(run)
        return read

    def index(self, layer: ModelLayer, keys: Tensor) -> Tensor:
        """Take index keys of the new columns; returns those of all columns."""
        self.enter(layer, "index")
        rows, run = self.rows, self.rows.running
        if run is not None and (run.dropped or layer.index in run.indexed):
            raise self._not_ended(layer)
        try:
            check_index(layer, keys)
            run = self._opened(layer, keys.shape[0], keys.shape[1], keys.device)
            read = index(rows.blocks.allocated() if run.before or run.written else None, run, layer, keys)
        except BaseException:
            rows.abort()
            raise
        run.indexed.add(layer.index)
        self._finish(run)
        return read

    def check_batch(self, batch: int) -> None:
        """Stop rows that stand for the same prompt: states are read before it is known how many rows there are."""
        told = self.rows.num_told
        if told not in (0, batch):
            self.rows.abort()
            raise ValueError(
                f"the batch has {batch} rows, and begin was told {told}; of a model that keeps states tell begin every "
                "row, also those of beams and of several answers: ids.repeat_interleave(n, 0)"
            )

    def _finish(self, run: Pass) -> None:
        if (len(run.written), len(run.indexed)) == (self.num_layers, self.num_indexed) and not self.rows.states:
            self.rows.finish()

    def enter(self, layer: ModelLayer, call: str) -> None:
        if not self.rows.enter(layer.index, call):
            raise self._not_ended(layer)

    def _opened(self, layer: ModelLayer, batch: int, count: int, device: torch.device) -> Pass:
        """The pass under way, which adds so many columns to so many rows; one that begins now, where there is none."""
        run = self.rows.running
        if run is None:
            return self.rows.open(batch, count, device)
        if (run.batch, run.count) != (batch, count):
            raise UnsupportedModel(
                f"layer {layer.index} adds {count} columns to {batch} rows, the layers before it {run.count} to "
                f"{run.batch}; all layers must add the same"
            )
        return run

    def _not_ended(self, layer: ModelLayer) -> RuntimeError:
        return RuntimeError(
            f"layer {layer.index} begins a pass, but the one before has not ended: {self._how_far(self.rows.running)}"
        )

    @property
    def recording(self) -> bool:
        """Whether passes may be cut by `crop`, however far their windows moved on."""
        return self.rows.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self.rows.recording = value

    def _how_far(self, run: Pass | None) -> str:
        if run is not None and run.dropped:
            return "another cache on the same blocks began one meanwhile. Call abort() to go on from the pass before it"
        return (
            f"{len(run.written) if run else 0} of {self.num_layers} layers have written. If it failed, call abort(); "
            "if these are all that ever write, the model cannot be served"
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


class PagedIndexedLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """One layer with index keys beside K and V, all in blocks."""

    def __init__(self, state: LayerState, layer: ModelLayer) -> None:
        super().__init__(state, layer)
        self.positions: Tensor | None = None

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of all columns, [kinds of position, rows, columns], where the model puts them here."""
        return self.positions

    @indexer_position_ids.setter
    def indexer_position_ids(self, value: Tensor | None) -> None:
        self._state.enter(self._layer, "positions")
        self.positions = value

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self._state.index(self._layer, indexer_key_states)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_index(self, idx_k: Tensor) -> Tensor:
        """As MiniMax M3 asks for it, [rows, 1, columns, dim]."""
        return self._state.index(self._layer, idx_k.squeeze(1)).unsqueeze(1)


class StateLayer(LinearAttentionLayer):
    """One layer that keeps states and no K and V, as transformers asks for it."""

    is_compileable = False

    def __init__(self, state: LayerState, layer: ModelLayer) -> None:
        self._state, self._layer = state, layer
        recording = state.recording  # which transformers' constructor sets
        LinearAttentionLayer.__init__(self, number_of_states=layer.states)
        self.record_past = recording

    @property
    def record_past(self) -> bool:
        return self._state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._state.recording = value

    @property
    def has_states(self) -> bool:
        """Whether any state has been put here."""
        return any(self.has_previous_state.values()) or any(self.is_recurrent_states_initialized.values())

    def enter(self, call: str) -> None:
        """A pass is about to read or write a state."""
        self._state.enter(self._layer, call)

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_gradient(conv_states)
        self._state.check_batch(len(conv_states))
        states: Tensor = super().update_conv_state(conv_states, *args, **kwargs)
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_gradient(recurrent_states)
        self._state.check_batch(len(recurrent_states))
        states: Tensor = super().update_recurrent_state(recurrent_states, *args, **kwargs)
        return states

    def __repr__(self) -> str:
        return "a layer of states"


class PagedStateLayer(StateLayer, PagedLayer):  # type: ignore[no-untyped-call, override]
    """One layer with states, and with K and V in blocks."""

    def __init__(self, state: LayerState, layer: ModelLayer) -> None:
        PagedLayer.__init__(self, state, layer)
        StateLayer.__init__(self, state, layer)


def cache_layers(config: PreTrainedConfig, state: LayerState, described: Sequence[ModelLayer]) -> tuple[Any, States]:
    """A list of the layers of a cache for transformers, by what each keeps, and the states of all of them."""
    others = DynamicCache(config=text_config(config)).layers
    layers: list[Any] = []
    for layer in described:
        if layer.states:
            layers.append(PagedStateLayer(state, layer) if layer.writes else StateLayer(state, layer))
        elif layer.writes:
            layers.append(PagedIndexedLayer(state, layer) if layer.index_dim else PagedLayer(state, layer))
        else:
            layers.append(others[layer.index])
    return layers, States(
        [layer for layer in layers if isinstance(layer, StateLayer)],
        [layer for layer in layers if isinstance(layer, PagedIndexedLayer)],
    )


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
    sides = [(keys, cache.num_heads, cache.head_dim), (values, cache.num_heads, cache.v_head_dim)]
    if layer.index_dim:
        index_keys = run.index_keys.pop(layer.index, None)
        if index_keys is None:  # they come later
            index_keys = keys.new_zeros(keys.shape[0], keys.shape[2], layer.index_dim)
        sides.append((index_keys[:, None].to(engine.dtype), 1, layer.index_dim))
    _write(cache, run, group, sides)
    read = _read(cache, run, group, layer.window, shape)
    if mixed:
        read = read[0].to(dtypes[0]), read[1].to(dtypes[1])
    if text_config(config).model_type in _TAKES_VIEWS:
        read = read[0].contiguous(), read[1].contiguous()
    return read


def index(engine: CacheEngine | None, run: Pass, layer: ModelLayer, keys: Tensor) -> Tensor:
    """Take index keys [rows, new columns, dim] to lie beside their K and V; returns those of all columns.

    Args:
        engine: None where nothing was written yet.
    """
    if layer.index not in run.written:
        run.index_keys[layer.index] = keys
    if engine is None:
        return keys
    storage = layer.storage or 0
    cache, group = engine[storage], engine.group_of(storage)
    held = _index_tensor(cache)
    if layer.index in run.written:
        rows = keys[:: run.factor].flatten(0, 1)
        slots = run.slots[group]
        held[slots // cache.block_size, slots % cache.block_size] = (
            rows if run.chosen is None else rows[run.chosen]
        ).to(held.dtype)
    before = held[run.tables[group].long()].flatten(1, 2)  # [rows, slots, dim]
    if run.gathered_at is None or run.padding is None:
        before = before[:, : run.before]
    else:
        before = before.flatten(0, 1)[run.gathered_at[:, : run.before]]
        before.masked_fill_(run.padding[:, : run.before, None], 0)
    if run.factor > 1:
        before = before.repeat_interleave(run.factor, 0)
    return torch.cat([before.to(keys.dtype), keys], 1)


def _index_tensor(cache: PagedKVCache) -> Tensor:
    """The index keys of all blocks, [blocks, block_size, dim]."""
    keys = cache.tensors["index"]
    if cache.layout == "NHD":
        return keys[:, :, 0]
    return keys[:, 0] if cache.layout == "HND" else keys[:, 0].transpose(1, 2)


def check_index(layer: ModelLayer, keys: Tensor) -> None:
    if keys.ndim != 3 or keys.shape[2] != layer.index_dim or not keys.shape[0]:
        raise UnsupportedModel(
            f"layer {layer.index} makes index keys {list(keys.shape)}; by its config they are [rows, tokens, "
            f"{layer.index_dim}]"
        )
    _check_gradient(keys)


def check_states(layer: ModelLayer, keys: Tensor, values: Tensor) -> None:
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3] or not keys.shape[0]:
        raise UnsupportedModel(
            f"layer {layer.index} makes K {list(keys.shape)} and V {list(values.shape)}; served are [rows, heads, "
            "tokens, dim], alike but for dim"
        )
    _check_gradient(keys)
    _check_gradient(values)


def _check_gradient(states: Tensor) -> None:
    if states.requires_grad:
        raise RuntimeError("what lies in blocks takes part in no gradient; run the model under torch.inference_mode()")


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


def _write(cache: PagedKVCache, run: Pass, group: int, sides: Sequence[tuple[Tensor, int, int]]) -> None:
    """Write the tensors [rows, heads, new columns, dim], each into so many heads of so many dims."""
    made = []
    for states, heads, dim in sides:
        rows = states[:: run.factor].transpose(1, 2).flatten(0, 1)
        if run.chosen is not None:
            rows = rows[run.chosen]
        if rows.shape[1:] != (heads, dim):
            rows = pad(rows, (0, dim - rows.shape[2], 0, heads - rows.shape[1]))
        made.append(rows)
    cache.write(*made, run.slots[group])


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
    sides = cache.gather(tables.flatten(), stop if unpadded else len(tables) * length)[:2]
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
