"""`Plan`: the figures of a model's cache, and the same in words. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from kvblocks.planner.explain import explain, to_dict
from kvblocks.planner.figures import Figures

__all__ = ["Plan"]


@dataclass(frozen=True, repr=False)
class Plan(Figures):
    """What a model's cache takes on one device, and what fits there. Made by `kvblocks.plan`.

    With pipeline stages, figures are of the stage that takes the most, and what fits is what fits on every stage.
    """

    def explain(self) -> str:
        """Every figure with its arithmetic, and where something does not fit, what is missing and what would help."""
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON takes them."""
        return to_dict(self)
