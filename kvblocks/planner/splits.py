"""How a model splits over several devices: every size of tensor parallelism side by side, and the fewest devices.

Each split is a plan of its own, so that nothing is estimated.
"""

from dataclasses import dataclass

from kvblocks.planner.figures import Figures
from kvblocks.planner.parallel import splits_evenly, stage_layers

__all__ = ["MOST_DEVICES", "Split", "best_split", "fewest_devices", "splits"]

MOST_DEVICES = 64
_NODE = 8  # devices with a fast link between all of them, over which heads are split first


@dataclass(frozen=True)
class Split:
    """One size of tensor parallelism.

    Args:
        tp: devices over which heads are split.
        copies: of the model, on all devices together.
        sequences: that fit at once on all copies together, of the length that is asked for or the plan's default.
        plan: of one copy.
    """

    tp: int
    copies: int
    sequences: int
    plan: Figures

    @property
    def holds(self) -> bool:
        """Whether it holds what is asked for, and a sequence of the reference length."""
        return self.plan.fits and self.sequences > 0


def splits(plan: Figures) -> tuple[Split, ...]:
    """Every size of tensor parallelism over the devices there are, the smallest first; none without a memory.

    Where the plan names no number of devices each split has one copy of the model, and up to 8 devices or the plan's.
    """
    settings = plan.settings
    if settings.memory is None:
        return ()
    stages = len(settings.stages)
    devices = settings.gpus or stages * max(_NODE, settings.tp)
    found = []
    for tp in _sizes(plan, devices // stages):
        copies = 1 if settings.gpus is None else devices // (tp * stages)
        one = plan.replaced(tp=tp, copies=copies)
        found.append(Split(tp, copies, copies * one.max_concurrency(settings.reference_len), one))
    return tuple(found)


def best_split(found: tuple[Split, ...]) -> Split:
    """The split that fits and holds the most sequences, of two that hold equally many the smaller.

    Where the plan names no number of devices it is the smallest that fits; where none holds a sequence, the largest,
    which lacks the least.
    """
    counted = found[0].plan.settings.gpus is not None
    if not any(split.sequences for split in found):
        return found[-1]
    return max(found, key=lambda split: (split.holds, split.sequences if counted else 0, -split.tp))


def fewest_devices(plan: Figures) -> Figures | None:
    """The plan with the fewest devices on which what is asked for fits, one copy; None beyond `MOST_DEVICES`.

    As people run them: one, two, four or eight devices, then whole nodes of eight. Heads are split first, over up to
    eight devices, then layers.
    """
    memory, weights = plan.memory or 0, plan.settings.weights
    for devices in (1, 2, 4, *range(_NODE, MOST_DEVICES + 1, _NODE)):
        if weights > memory * devices:
            continue
        sizes = [tp for tp in _sizes(plan, min(devices, _NODE)) if _NODE % tp == 0 and devices % tp == 0]
        for tp in sorted(sizes, reverse=True):
            try:
                stages = stage_layers(plan.model, devices // tp)
            except ValueError:  # more stages than layers, or a layer apart from the one whose cache it reads
                continue
            one = plan.replaced(tp=tp, stages=stages, copies=1)
            if one.fits:
                return one
    return None


def _sizes(plan: Figures, most: int) -> list[int]:
    """Numbers of devices over which the query heads split evenly; powers of two where these are not known."""
    known = bool(plan.model.query_heads)
    return [tp for tp in range(1, most + 1) if splits_evenly(plan.model, tp) and (known or tp & (tp - 1) == 0)]
