"""Which layers a pipeline stage runs, and whether a split over devices makes sense. Integers only."""

import math
from collections.abc import Sequence

from kvblocks.models.shapes import ModelCache

__all__ = ["check_tp", "splits_evenly", "stage_layers"]


def stage_layers(model: ModelCache, pp: "int | Sequence[int]") -> tuple[int, ...]:
    """Layers of each stage: as given, or as even as can be, the first stages taking one more.

    Raises:
        TypeError: neither an integer nor a list of them.
        ValueError: more stages than layers, layers that do not add up to the model's, or a layer on another stage than
            the one whose cache it reads.
    """
    total = len(model.layers)
    if isinstance(pp, int) and not isinstance(pp, bool):
        if not 1 <= pp <= total:
            raise ValueError(f"pp={pp} is outside 1..{total}, the layers of {model.name}")
        layers = tuple(total // pp + (i < total % pp) for i in range(pp))
    else:
        if isinstance(pp, str | bytes | bool) or not isinstance(pp, Sequence):
            raise TypeError(f"pp={pp!r} is of type {type(pp).__name__}; give an integer, or the layers of each stage")
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in pp):
            raise ValueError(f"pp={pp!r}: each stage has at least one layer")
        if sum(pp) != total:
            raise ValueError(f"pp={pp!r} adds up to {sum(pp)} layers; {model.name} has {total}")
        layers = tuple(pp)
    stage_of = [stage for stage, number in enumerate(layers) for _ in range(number)]
    for layer in model.layers:
        if layer.reads is not None and stage_of[layer.reads] != stage_of[layer.index]:
            raise ValueError(
                f"pp={pp}: layer {layer.index} of {model.name} reads the cache of layer {layer.reads}, which is on "
                f"another stage; give the layers of each stage so that they are on one"
            )
    return layers


def check_tp(model: ModelCache, tp: int) -> None:
    """Raises ValueError where the query heads cannot be split evenly."""
    for queries in model.query_heads:
        if queries % tp == 0:
            continue
        small = [number for number in range(1, math.isqrt(queries) + 1) if queries % number == 0]
        good = [str(number) for number in sorted({*small, *(queries // number for number in small)})]
        shown = ", ".join(good[:-1]) + f" or {good[-1]}" if len(good) > 1 else good[0]
        raise ValueError(f"num_attention_heads={queries} does not divide by tp={tp}; use {shown}")


def splits_evenly(model: ModelCache, tp: int) -> bool:
    """Whether all of `tp` devices can have equally many query heads."""
    return all(queries % tp == 0 for queries in model.query_heads)
