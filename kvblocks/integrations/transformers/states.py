"""What caches keep for a row or a sequence and not for a token: states of convolutions, linear attention and Mamba.

Transformers' own layers hold and update them, [rows, ...] each; `States` are those of all layers. A pass works on
copies of its own, so that it can be taken back, and rows can share what none of them writes. `SlotStates` brings them
to the slots of an engine and back. Imports torch and the engine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvblocks.config import LayerTensor
from kvblocks.engine import CacheEngine
from kvblocks.integrations.transformers.layers import flat

__all__ = ["Fields", "LayerStates", "SlotStates", "States"]

# Of transformers' layers, by the number of a state: its tensor, what else may be known of it, and what is so or not.
_TENSORS = ("conv_states", "recurrent_states")
_UNKNOWN = (*_TENSORS, "conv_kernel_size")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
Fields = dict[str, dict[int, Any]]


class States:
    """The states of all layers of one cache, of all rows of its batch.

    Tensors are written by the pass under way only, and by it in copies of its own.

    Args:
        layers: of transformers' cache, those that have states.
        indexed: those that may have `positions`, [kinds of position, rows, columns].
    """

    def __init__(self, layers: Sequence[Any] = (), indexed: Sequence[Any] = ()) -> None:
        self._layers, self._indexed = layers, indexed
        self._saved: tuple[list[Fields], list[Tensor | None]] | None = None

    def __bool__(self) -> bool:
        """Whether a layer has states."""
        return bool(self._layers)

    def begin(self) -> None:
        """A pass begins, and may be taken back until the next one does."""
        self._saved = self.held()
        for layer in self._layers:
            for name in _TENSORS:
                tensors = getattr(layer, name)
                tensors.update({number: held.clone() for number, held in tensors.items() if held is not None})

    def keep(self) -> None:
        """The pass that has begun counts, and is not taken back any more."""
        self._saved = None

    def restore(self) -> None:
        """Take the pass back that has begun, if one has."""
        if self._saved is not None:
            self.hold(*self._saved)
            self._saved = None

    def held(self) -> tuple[list[Fields], list[Tensor | None]]:
        """What `hold` takes: the same tensors, which no pass will write. No pass is under way."""
        fields = [{name: dict(getattr(layer, name)) for name in _UNKNOWN + _FLAGS} for layer in self._layers]
        return fields, [layer.positions for layer in self._indexed]

    def hold(self, fields: Sequence[Mapping[str, Mapping[int, Any]]], positions: Sequence[Tensor | None]) -> None:
        """Go on from what `held` or `selected` gave, of a cache of the same model."""
        for layer, of_layer in zip(self._layers, fields, strict=True):
            for name, values in of_layer.items():
                setattr(layer, name, dict(values))
        for indexed, held in zip(self._indexed, positions, strict=True):
            indexed.positions = held

    def selected(self, indices: Sequence[int]) -> tuple[list[Fields], list[Tensor | None]]:
        """What `hold` takes for other rows: row i is what row `indices[i]` is."""
        fields, positions = self.held()
        for of_layer in fields:
            for name in _TENSORS:
                of_layer[name] = {number: _rows(held, indices, 0) for number, held in of_layer[name].items()}
        return fields, [_rows(held, indices, 1) for held in positions]

    def crop(self, columns: int, dropped: int) -> None:
        """Drop the last `dropped` of `columns` columns, 0 to all of them; what was recorded beyond need goes too.

        Raises:
            ValueError: a state cannot go back so far; nothing was changed.
        """
        if dropped == columns:
            self.clear()
            return
        fields, positions = self.held()
        for of_layer in fields:
            if dropped and any(held is not None for held in of_layer["recurrent_states"].values()):
                raise ValueError(
                    f"{dropped} columns cannot be dropped: the model keeps a recurrent state, which does not go back"
                )
            for number, held in of_layer["conv_states"].items():
                if held is not None:
                    width = of_layer["conv_kernel_size"][number]
                    left = held.shape[-1] - dropped
                    if dropped and left < width and held.shape[-1] != columns:
                        raise ValueError(
                            f"{dropped} columns cannot be dropped: convolutions hold the last {held.shape[-1]} of "
                            f"{columns} columns and need {width}. To cut more, call activate_past_recording() before "
                            "the pass that is to be cut"
                        )
                    of_layer["conv_states"][number] = held[..., max(0, left - width) : left]
        self.hold(fields, [held if held is None else held[..., : columns - dropped] for held in positions])

    def minimal(self) -> list[Fields]:
        """`held`, without what was recorded only to be cropped."""
        fields = self.held()[0]
        for of_layer in fields:
            for number, held in of_layer["conv_states"].items():
                if held is not None:
                    width = of_layer["conv_kernel_size"][number]
                    held = held[..., max(0, held.shape[-1] - width) :]
                    of_layer["conv_states"][number] = pad(held, (width - held.shape[-1], 0))
        return fields

    @property
    def has_positions(self) -> bool:
        """Whether layers may hold the positions of all columns beside states."""
        return bool(self._layers and self._indexed)

    def place(self, positions: Tensor) -> None:
        """Let the columns that are there be at `positions` [kinds of position, rows, columns]."""
        for indexed in self._indexed:
            indexed.positions = positions

    def clear(self) -> None:
        """Hold nothing, of no rows."""
        self._saved = None
        for layer in self._layers:
            for names, value in ((_UNKNOWN, None), (_FLAGS, False)):
                for name in names:
                    setattr(layer, name, dict.fromkeys(range(layer.number_of_states), value))
        for indexed in self._indexed:
            indexed.positions = None


def _rows(held: Tensor | None, indices: Sequence[int], axis: int) -> Tensor | None:
    return None if held is None else held.index_select(axis, torch.tensor(indices, device=held.device))


@dataclass(frozen=True)
class LayerStates:
    """The states of one layer as any pass leaves them, whatever its length.

    Attributes:
        tensors: (field, number of the state, shape without rows, dtype) of each.
        others: what else the fields of transformers' layer hold.
    """

    tensors: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    others: Fields

    @classmethod
    def of(cls, fields: Fields) -> "LayerStates":
        """Those of a layer that a pass has been in."""
        return cls(
            tuple(
                (name, number, tuple(held.shape[1:]), held.dtype)
                for name in _TENSORS
                for number, held in fields[name].items()
                if held is not None
            ),
            {name: dict(values) for name, values in fields.items() if name not in _TENSORS},
        )

    def fits(self, other: "LayerStates") -> bool:
        """Whether nothing is lost where these states are kept as those of `other` are."""
        return len(self.tensors) == len(other.tensors) and all(
            mine[:3] == its[:3] and torch.promote_types(mine[3], its[3]) == its[3]
            for mine, its in zip(self.tensors, other.tensors, strict=True)
        )

    def flat(self) -> tuple[LayerTensor, ...]:
        """What a slot has to hold of them."""
        return flat((str(dtype).removeprefix("torch."), math.prod(shape)) for _, _, shape, dtype in self.tensors)


class SlotStates:
    """The states of a model's layers in the slots of an engine.

    Args:
        layers: those that have states, in order.
        engine: has room for them, in as many layers.

    Raises:
        ValueError: it has more or fewer layers with states, or one has no room for those of its layer.
    """

    def __init__(self, layers: Sequence[LayerStates], engine: CacheEngine) -> None:
        self.engine, self._layers = engine, layers
        caches = [cache for cache in engine.states if cache is not None]
        self._views: list[list[Tensor]] = []  # [slots, numbers] of each state, by layer
        if len(layers) != len(caches):
            raise ValueError(f"{len(layers)} layers of the model have states, and the pool has room for {len(caches)}")
        for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            taken = dict.fromkeys(cache.tensors, 0)
            self._views.append([])
            for _, _, shape, dtype in layer.tensors:
                kept, count = _kept(dtype, shape)
                fitting = [
                    name
                    for name, tensor in cache.tensors.items()
                    if tensor.dtype == kept and taken[name] + count <= tensor.shape[1]
                ]
                if not fitting:
                    raise ValueError(
                        f"layer {number} of those with states keeps {list(shape)} of {dtype}, and the pool has "
                        f"{cache!r}; make the pool of the model: kvblocks.Pool(model, ...)"
                    )
                low = taken[fitting[0]]
                taken[fitting[0]] += count
                with torch.inference_mode(False):
                    self._views[-1].append(cache[fitting[0]][:, low : low + count])

    def read(self, slots: Tensor) -> list[Fields]:
        """What `States.hold` takes, of rows whose states lie in `slots` [rows]; copies."""
        read = []
        for layer, views in zip(self._layers, self._views, strict=True):
            fields: Fields = {name: dict(values) for name, values in layer.others.items()}
            fields.update({name: dict.fromkeys(fields[_FLAGS[0]]) for name in _TENSORS})
            for (name, number, shape, dtype), view in zip(layer.tensors, views, strict=True):
                fields[name][number] = view.index_select(0, slots).view(dtype).view(-1, *shape)
            read.append(fields)
        return read

    def write(self, slots: Tensor, fields: Sequence[Fields], rows: Tensor | None = None) -> None:
        """Put what a pass has made, as `States.held` gives it, into `slots` [n].

        Args:
            rows: [n] of the states, whose rows these are; None for all, in order.

        Raises:
            ValueError: they are others than those that slots hold; nothing was written.
        """
        for of_layer, layer in zip(fields, self._layers, strict=True):
            made = LayerStates.of(of_layer)
            if not made.fits(layer):
                raise ValueError(f"a layer's states are {made.tensors} after this pass, and slots hold {layer.tensors}")
        for of_layer, layer, views in zip(fields, self._layers, self._views, strict=True):
            for (name, number, _, dtype), view in zip(layer.tensors, views, strict=True):
                held = of_layer[name][number] if rows is None else of_layer[name][number][rows]
                view.index_copy_(0, slots, held.to(dtype).flatten(1).view(view.dtype))


def _kept(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.dtype, int]:
    """How a state lies in a slot: the dtype, and numbers of it."""
    count = math.prod(shape)
    return (dtype, count) if dtype.is_floating_point else (torch.uint8, count * dtype.itemsize)
