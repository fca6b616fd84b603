"""CachedModel: a model that attends by itself, over a cache whose K and V lie in the blocks of a step.

For models whose layers cannot read the blocks in place (see `backend`). Rows of one length go through the model
together, without padding. Scheduling is not here. Imports transformers.
"""

import inspect
import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from kvblocks.engine import CacheEngine
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.backend import PagedModel, check_state, unwrapped
from kvblocks.integrations.transformers.layer import (
    StateLayer,
    cache_layers,
    check_index,
    check_states,
    exchange,
    index,
)
from kvblocks.integrations.transformers.layers import (
    KVShape,
    ModelLayer,
    cache_argument,
    check_splits,
    goes_on_by_one,
)
from kvblocks.integrations.transformers.passes import Pass
from kvblocks.integrations.transformers.states import Fields, LayerStates, SlotStates
from kvblocks.step.buffers import StepBuffers

__all__ = ["CachedModel", "served"]

_log = logging.getLogger("kvblocks")


class CachedModel:
    """A model over its own attention: what a step names is gathered for it, and what it makes is written.

    Args:
        model: a transformers model, or what torch.compile or PEFT made of one.

    Attributes:
        model: the transformers model.
        layers: of it.
        keeps_states: whether a layer keeps states, which `forward` reads and makes.

    Raises:
        UnsupportedModel: the model keeps what no cache here holds, takes no cache, makes K and V that depend on how a
            prompt is split into passes, or is in training mode.
    """

    attends_in_blocks = False

    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        self.layers = check_state(self.model)
        check_splits(self.model.config)
        self.keeps_states = any(layer.states for layer in self.layers)
        self._one_by_one = goes_on_by_one(type(self.model))
        if self.model.training:
            raise UnsupportedModel(f"{type(self.model).__name__} is in training mode; call model.eval()")
        self._call = model
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._cache_argument = cache_argument(self.model.forward)
        self._slots: SlotStates | None = None

    def measure(self) -> KVShape:
        """What the layers hand to their cache: two rows of two tokens are run through the model, the first time.

        Raises:
            UnsupportedModel: a layer does what the cache cannot serve, or a token's logits depend on the one after it.
        """
        return self._measure()[0]

    def states(self) -> tuple[LayerStates, ...]:
        """The states of each layer that keeps any; measured with `measure`."""
        return self._measure()[1]

    @torch.inference_mode()
    def _measure(self) -> tuple[KVShape, tuple[LayerStates, ...]]:
        if self.model in _measured:
            return _measured[self.model]
        state = _Measured()
        ids = torch.tensor([[0, 1], [0, 2]], device=self.model.device)
        with torch.autocast(ids.device.type, enabled=False):  # states are kept as they are without it, or wider
            logits, held = self._run(state, ids, 0, [0])
        first, second = logits[:, 0].float()
        if not torch.allclose(first, second, rtol=0, atol=0.01 * float(first.abs().max()), equal_nan=True):
            raise UnsupportedModel(f"{type(self.model).__name__} attends to later tokens too, which come after a pass")
        writing = [layer for layer in self.layers if layer.writes]
        layers = tuple(LayerStates.of(fields) for fields in held)
        shape = KVShape.of(
            [state.shapes[layer.index] for layer in writing],
            [layer.index_dim for layer in writing],
            [layer.flat() for layer in layers],
        )
        _measured[self.model] = shape, layers
        return shape, layers

    def as_cached(self) -> bool:
        """As `PagedModel.as_cached`; here all goes through a cache."""
        return True

    def forward(self, engine: CacheEngine, step: StepBuffers, wanted: Tensor) -> Tensor:
        """As `PagedModel.forward`, in one pass of the model for each length and number of new tokens among the rows.

        Models of Mamba 1 (Jamba, Zamba) go on from a state by one token in a pass of their own. States are read from
        the slots of the step, and written there when the pass of their rows is over.
        """
        kept = self._slots_of(engine) if self.keeps_states else None
        lens = step.seq_lens[: step.num_seqs].tolist()
        starts = step.query_start_loc[: step.num_seqs + 1].tolist()
        alike: dict[tuple[int, int], list[int]] = {}
        for row, length in enumerate(lens):
            count = starts[row + 1] - starts[row]
            alike.setdefault((length - count, count), []).append(row)
        asked: dict[int, list[tuple[int, int]]] = {}  # by row: which of `wanted` lie in it, and where in its new tokens
        for number, token in enumerate(wanted.tolist()):
            row = bisect_right(starts, token) - 1
            asked.setdefault(row, []).append((number, token - starts[row]))
        found: dict[int, Tensor] = {}
        for (before, count), rows in alike.items():
            firsts = torch.tensor([starts[row] for row in rows], device=engine.device)[:, None]
            slots = None if step.state_slots is None else step.state_slots[rows]
            held = kept.read(slots) if kept is not None and slots is not None and before else None
            each = 1 if before and self._one_by_one else count
            for first in range(0, count, each):
                tokens = firsts + torch.arange(first, first + each, device=engine.device)
                here = [
                    (number, line, at - first) for line, row in enumerate(rows) for number, at in asked.get(row, ())
                ]
                here = [(number, line, at) for number, line, at in here if 0 <= at < each]
                columns = sorted({at for _, _, at in here})
                state = _Stepping(self.model.config, engine, self._pass(engine, step, rows, tokens, before + first))
                logits, held = self._run(state, step.input_ids[tokens], before + first, columns, held)
                found.update((number, logits[line, columns.index(at)]) for number, line, at in here)
            if kept is not None and slots is not None and held is not None:
                kept.write(slots, held)
        ordered = [found[number] for number in range(len(found))]
        return torch.stack(ordered) if ordered else torch.empty(0, device=engine.device)

    def _slots_of(self, engine: CacheEngine) -> SlotStates:
        if self._slots is None or self._slots.engine is not engine:
            self._slots = SlotStates(self.states(), engine)
        return self._slots

    def _pass(self, engine: CacheEngine, step: StepBuffers, rows: list[int], tokens: Tensor, before: int) -> Pass:
        groups = step.num_groups
        blocks = -(-(before + tokens.shape[1]) // engine.block_size)
        slots = step.slot_mapping.view(groups, -1)[:, tokens.flatten()]
        tables = step.block_table.view(groups, step.max_seqs, -1)[:, rows, :blocks]
        tables = tables.clamp(min=0)  # padding is gathered too, and masked afterwards
        return Pass(len(rows), 1, before, tokens.shape[1], slots, tables)

    def _run(
        self,
        state: "_Stepping | _Measured",
        ids: Tensor,
        before: int,
        kept: list[int],
        past: Sequence[Fields] | None = None,
    ) -> tuple[Tensor, list[Fields]]:
        """Logits [rows, kept, vocabulary] of the columns `kept` of ids [rows, columns], after `before` others.

        `past` are the states after those others; the states after these come beside the logits.
        """
        rows, columns = ids.shape
        layers, states = cache_layers(self.model.config, state, self.layers)
        if before:
            positions = torch.arange(before, device=ids.device).expand(3, rows, before)  # of text, in each direction
            states.hold(past or [], [positions] * sum(layer.index_dim > 0 for layer in self.layers))
        inputs: dict[str, Any] = {"input_ids": ids, self._cache_argument: Cache(layers=layers)}
        if "use_cache" in self._arguments:
            inputs["use_cache"] = True
        if "attention_mask" in self._arguments:
            inputs["attention_mask"] = ids.new_ones(rows, before + columns)
        if "position_ids" in self._arguments:
            inputs["position_ids"] = torch.arange(before, before + columns, device=ids.device).expand(rows, -1)
        keeps = "logits_to_keep" in self._arguments
        if keeps:
            inputs["logits_to_keep"] = torch.tensor(kept, dtype=torch.int64, device=ids.device)
        output = self._call(**inputs, return_dict=True)
        missing = [layer.index for layer in self.layers if layer.writes and layer.index not in state.written]
        idle = [layer for layer in layers if isinstance(layer, StateLayer) and not layer.has_states]
        if idle:
            raise UnsupportedModel(
                f"{len(idle)} layers of {type(self.model).__name__} keep no states in the cache that the model is given"
            )
        if missing:
            raise UnsupportedModel(
                f"layers {missing} of {type(self.model).__name__} keep no K and V in the cache that the model is given"
            )
        logits: Tensor = output.logits
        return logits if keeps else logits[:, kept], states.held()[0]


class _Stepping:
    """What the layers share in one pass of rows of one length."""

    recording = False

    def __init__(self, config: PreTrainedConfig, engine: CacheEngine, run: Pass) -> None:
        self._config, self._engine, self._run = config, engine, run
        self.written = run.written

    def length(self, layer: ModelLayer) -> int:
        return self._run.before + (self._run.count if layer.index in self.written else 0)

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        check_states(layer, keys, values)
        if (keys.shape[0], keys.shape[2]) != (self._run.batch, self._run.count) or layer.index in self.written:
            raise UnsupportedModel(
                f"layer {layer.index} adds {keys.shape[2]} columns to {keys.shape[0]} rows, or adds them twice; the "
                f"pass has {self._run.count} for each of {self._run.batch}"
            )
        read = exchange(self._config, self._engine, self._run, layer, keys, values)
        self.written.add(layer.index)
        return read

    def index(self, layer: ModelLayer, keys: Tensor) -> Tensor:
        check_index(layer, keys)
        if keys.shape[:2] != (self._run.batch, self._run.count) or layer.index in self._run.indexed:
            raise UnsupportedModel(
                f"layer {layer.index} adds index keys of {keys.shape[1]} columns to {keys.shape[0]} rows, or adds them "
                f"twice; the pass has {self._run.count} for each of {self._run.batch}"
            )
        self._run.indexed.add(layer.index)
        return index(self._engine, self._run, layer, keys)

    def enter(self, layer: ModelLayer, call: str) -> None:
        """A pass is all that there is."""

    def check_batch(self, batch: int) -> None:
        """Nothing to check: the pass has as many rows as it was made for."""


class _Measured:
    """What the layers make of two tokens: heads, dim of K, dim of V."""

    recording = False

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def length(self, layer: ModelLayer) -> int:
        return 2 * (layer.index in self.written)

    def update(self, layer: ModelLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        check_states(layer, keys, values)
        if (keys.shape[0], keys.shape[2]) != (2, 2):
            raise UnsupportedModel(
                f"layer {layer.index} makes K and V {list(keys.shape)} of 2 rows of 2 tokens; served are [rows, heads, "
                "tokens, dim]"
            )
        self.shapes[layer.index] = (keys.shape[1], keys.shape[3], values.shape[3])
        self.written.add(layer.index)
        return keys, values

    def index(self, layer: ModelLayer, keys: Tensor) -> Tensor:
        check_index(layer, keys)
        return keys

    def enter(self, layer: ModelLayer, call: str) -> None:
        """A pass is all that there is."""

    def check_batch(self, batch: int) -> None:
        """Nothing to check: the pass has as many rows as it was made for."""


_measured: "WeakKeyDictionary[PreTrainedModel, tuple[KVShape, tuple[LayerStates, ...]]]" = WeakKeyDictionary()


def served(model: Any) -> PagedModel | CachedModel:
    """A model as a step can run it: by layers that read the blocks, else over a cache that gathers them.

    Args:
        model: a transformers model, what torch.compile or PEFT made of one, or what this function returned of one.

    The choice is made by running a token or two, the first time, and stays with the model. Where layers do not read the
    blocks, the logger "kvblocks" says at INFO why.

    Raises:
        UnsupportedModel: neither serves it.
    """
    if isinstance(model, PagedModel | CachedModel):
        return model
    inner = unwrapped(model)
    if inner not in _measured:
        try:
            paged = PagedModel(model)
            paged.measure()
            return paged
        except UnsupportedModel as error:
            if inner.training:
                raise
            reason = str(error)
        CachedModel(model).measure()
        _log.info("%s attends by itself, to K and V gathered from the blocks: %s", type(inner).__name__, reason)
    return CachedModel(model)
