"""Several plans side by side, a row each. Says nothing that the plans do not."""

from collections.abc import Sequence

from kvblocks.planner.figures import Figures
from kvblocks.planner.text import amount

__all__ = ["side_by_side"]


def side_by_side(plans: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, and a row of cells for each plan.

    A column that is empty for all plans is left out.
    """
    columns: dict[str, list[str]] = {
        "model": [plan.model.name for plan in plans],
        "K and V in": [plan.dtype for plan in plans],
        "split": [_split(plan) for plan in plans],
        "per token": [f"{plan.bytes_per_token:,} B" for plan in plans],
        "state": [amount(plan.state_bytes) if plan.state_bytes else "" for plan in plans],
        "weights": [amount(plan.weights_bytes) if plan.weights_bytes else "" for plan in plans],
        "tokens": [f"{plan.settings.seq_len:,}" if plan.settings.seq_len else "" for plan in plans],
        "a sequence": [amount(plan.sequence_bytes(plan.settings.seq_len or 0)) for plan in plans],
        "blocks": [f"{plan.num_blocks:,}" if plan.num_blocks is not None else "" for plan in plans],
        "at once": [_at_once(plan) for plan in plans],
        "longest": [f"{plan.max_seq_len():,}" if plan.memory is not None else "" for plan in plans],
        "fits": [_verdict(plan) for plan in plans],
    }
    if not any(plan.settings.seq_len for plan in plans):
        del columns["a sequence"]
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]


def _split(plan: Figures) -> str:
    settings = plan.settings
    parts = [f"tp={settings.tp}"] if settings.tp > 1 else []
    parts += [f"pp={len(settings.stages)}"] if len(settings.stages) > 1 else []
    parts += [f"{settings.copies} copies"] if settings.copies > 1 else []
    return ", ".join(parts)


def _at_once(plan: Figures) -> str:
    if plan.memory is None or plan.settings.seq_len is None:
        return ""
    return f"{plan.settings.copies * plan.max_concurrency(plan.settings.seq_len):,}"


def _verdict(plan: Figures) -> str:
    if plan.memory is None:
        return ""
    return "yes" if plan.fits else f"{amount(plan.missing_bytes)} missing"
