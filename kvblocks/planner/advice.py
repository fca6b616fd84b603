"""What would make a plan fit: the smallest changes, each tried before it is named."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvblocks.formats import LLAMA_CPP, narrower
from kvblocks.planner.figures import Figures
from kvblocks.planner.text import amount, count

__all__ = ["Change", "smallest_changes"]

_MOST_DEVICES = 64


@dataclass(frozen=True)
class Change:
    """A change of one setting with which the plan fits.

    Args:
        what: the change in words.
        setting: the argument of `plan` that changes.
        value: its new value.
        factor: the larger of the old and the new amount over the smaller one; 1.03 is a small change.
    """

    what: str
    setting: str
    value: Any
    factor: float


def smallest_changes(plan: Figures, most: int = 3) -> tuple[Change, ...]:
    """The changes of one setting each that make the plan fit, the smallest first; none where it fits already."""
    if plan.fits or plan.memory is None:
        return ()
    return tuple(sorted(_changes(plan), key=lambda change: change.factor)[:most])


def _changes(plan: Figures) -> Iterator[Change]:
    settings = plan.settings
    sequences, length = plan.target
    memory = plan.memory or 0
    needed = plan.memory_for(sequences, length)
    if plan.replaced(memory=needed).fits:
        factor = needed / memory if memory else float("inf")
        whole, had = (math.ceil(size / settings.utilization) for size in (needed, memory))
        yield Change(f"{amount(whole - had)} more memory on each device, {amount(whole)}", "memory", whole, factor)
    if sequences > 1:
        fewer = plan.max_concurrency(length)
        if fewer:
            yield Change(
                f"{count(fewer, 'sequence')} at once instead of {sequences:,}", "concurrency", fewer, sequences / fewer
            )
    if length > 1:
        shorter = plan.max_seq_len(sequences)
        if shorter:
            yield Change(f"sequences of {shorter:,} tokens instead of {length:,}", "seq_len", shorter, length / shorter)
    for candidate in narrower(settings.format, settings.engine):
        if plan.with_format(candidate).fits:
            name = (
                candidate.name
                if candidate.group_size is None or candidate.name in LLAMA_CPP
                else f"{candidate.name} in groups of {candidate.group_size}"
            )
            factor = settings.format.vector_bytes(1024) / candidate.vector_bytes(1024)
            yield Change(f"K and V in {name} instead of {plan.dtype}", "dtype", candidate.name, factor)
            break
    tp = _first(lambda tp: plan.replaced(tp=tp).fits, _wider(plan))
    if tp is not None:
        yield Change(f"tp={tp} instead of {settings.tp}", "tp", tp, tp / settings.tp)
    yield from _other_stages(plan)
    if settings.block_size > 1:
        size = _first(lambda size: plan.replaced(block_size=size).fits, _halves(settings.block_size))
        if size is not None:
            factor = settings.block_size / size
            yield Change(
                f"blocks of {count(size, 'token')} instead of {settings.block_size}", "block_size", size, factor
            )
    if plan.stage.checkpoints(sequences) and plan.replaced(checkpoints=0).fits:
        yield Change("no checkpoints of states, without which prompts find no prefix", "checkpoints", 0, 2)
    if settings.mla == "expanded" and settings.other_mla is not None:
        latent = plan.replaced(mla="latent", model=settings.other_mla, other_mla=settings.model)
        if latent.fits:
            factor = plan.bytes_per_token / latent.bytes_per_token
            yield Change("the latent cache instead of the expanded one", "mla", "latent", factor)


def _other_stages(plan: Figures) -> Iterator[Change]:
    from kvblocks.planner.parallel import stage_layers

    stages = len(plan.settings.stages)
    layers = plan.model.layers
    for pp in range(stages + 1, min(len(layers), _MOST_DEVICES) + 1):
        if pp & (pp - 1) and len(layers) % pp:
            continue  # stages are powers of two, or equally long: others are as fast as their longest, on odd devices
        try:
            split = stage_layers(plan.model, pp)
        except ValueError:
            continue
        if plan.replaced(stages=split).fits:
            yield Change(f"pp={pp} instead of {stages}", "pp", pp, pp / stages)
            return


def _wider(plan: Figures) -> Iterator[int]:
    """Larger numbers of devices over which the query heads split evenly."""
    queries, tp = plan.model.query_heads, plan.settings.tp
    if not queries:
        return iter(range(2 * tp, _MOST_DEVICES + 1, tp))
    return (n for n in range(tp + 1, _MOST_DEVICES + 1) if all(number % n == 0 for number in queries))


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _first(holds: Callable[[int], bool], numbers: Iterator[int]) -> int | None:
    return next((number for number in numbers if holds(number)), None)
