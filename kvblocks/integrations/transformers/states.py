"""What caches keep for a row or a sequence and not for a token: states of convolutions, linear attention and Mamba.

Transformers' own layers hold and update them, [rows, ...] each. A pass works on copies of its own, so that it can be
taken back, and rows can share what none of them writes. Imports torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fields", "SequenceStates", "States"]

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


class SequenceStates:
    """The states of sequences of a block manager, by handle: of a batch for a pass, of each by itself between two.

    Sequences may share tensors, as no pass writes those that it was given.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[Fields]] = {}
        self._made: dict[int, list[Fields]] = {}  # by the pass under way
        self._seqs: Sequence[int] = ()

    def open(self, seqs: Sequence[int]) -> None:
        """A pass begins: row i of its step is sequence `seqs[i]`."""
        self._seqs, self._made = seqs, {}

    def stacked(self, rows: Sequence[int]) -> list[Fields]:
        """What `States.hold` takes for these rows of the step, none of which is at its beginning; as copies."""
        held = [self._held[self._seqs[row]] for row in rows]
        stacked = []
        for of_layer in zip(*held, strict=True):
            fields: Fields = {name: dict(values) for name, values in of_layer[0].items()}
            for name in _TENSORS:
                fields[name] = {
                    number: None if first is None else torch.cat([of_row[name][number] for of_row in of_layer])
                    for number, first in of_layer[0][name].items()
                }
            stacked.append(fields)
        return stacked

    def put(self, rows: Sequence[int], fields: Sequence[Fields]) -> None:
        """What a pass has made of these rows, as `States.held` gives it."""
        for line, row in enumerate(rows):
            made = [{name: dict(values) for name, values in of_layer.items()} for of_layer in fields]
            for of_layer in made:
                for name in _TENSORS:
                    for number, tensor in of_layer[name].items():
                        of_layer[name][number] = None if tensor is None else tensor[line : line + 1]
            self._made[self._seqs[row]] = made

    def commit(self) -> None:
        """The pass counts."""
        self._held.update(self._made)
        self._made = {}

    def abort(self) -> None:
        """It never was."""
        self._made = {}

    def fork(self, parent: int, children: Sequence[int]) -> None:
        """Let each child go on from where its parent is."""
        if parent in self._held:
            self._held.update(dict.fromkeys(children, self._held[parent]))

    def drop(self, seqs: Sequence[int]) -> None:
        """Forget these: they have ended, or begin anew."""
        for seq in seqs:
            self._held.pop(seq, None)

    def __len__(self) -> int:
        """Sequences that have states."""
        return len(self._held)
