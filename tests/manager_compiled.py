"""How the tests that also know the plain-Python model drive the compiled block manager."""

from typing import Any

import torch
from manager_machine import Driver, StepView
from manager_model import Move

from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers


def make_step(max_seqs: int, max_tokens: int, max_blocks_per_seq: int, groups: int = 1) -> StepBuffers:
    return StepBuffers(max_seqs, max_tokens, max_blocks_per_seq, groups=groups, kv_indices=True, states=True)


def by_group(tensor: torch.Tensor | None, groups: int) -> list[Any]:
    """As lists, one for each group also where there is one."""
    assert tensor is not None
    values: list[Any] = tensor.tolist()
    return values if groups > 1 else [values]


def read_step(step: StepBuffers) -> StepView:
    groups = step.num_groups
    starts = by_group(step.kv_indptr, groups)
    pages = [found[: ends[-1]] for ends, found in zip(starts, by_group(step.kv_indices, groups), strict=True)]
    assert step.kv_last_page_len is not None
    assert step.state_slots is not None
    assert step.state_zero is not None
    assert step.state_drafts is not None
    assert step.state_copies is not None
    return StepView(
        step.input_ids.tolist(),
        step.positions.tolist(),
        by_group(step.slot_mapping, groups),
        by_group(step.block_table, groups),
        starts,
        pages,
        step.kv_last_page_len.tolist(),
        step.seq_lens.tolist(),
        step.query_start_loc.tolist(),
        [(source, target) for source, target in step.copies.tolist()],
        [Move(bool(kind), group, source, target) for kind, group, source, target in step.moves.tolist()],
        step.state_slots.tolist(),
        step.state_zero.tolist(),
        [(source, target) for source, target in step.state_copies.tolist()],
        step.state_drafts.tolist(),
        step.num_seqs,
        step.num_tokens,
        step.max_query_len,
        step.max_seq_len,
    )


COMPILED = Driver(BlockManager, make_step, read_step)
