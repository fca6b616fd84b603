"""How the tests that also know the plain-Python model drive the compiled block manager."""

from manager_machine import Driver, StepView

from kvblocks.manager import BlockManager
from kvblocks.step import StepBuffers


def make_step(max_seqs: int, max_tokens: int, max_blocks_per_seq: int) -> StepBuffers:
    return StepBuffers(max_seqs, max_tokens, max_blocks_per_seq)


def read_step(step: StepBuffers) -> StepView:
    return StepView(
        step.input_ids.tolist(),
        step.positions.tolist(),
        step.slot_mapping.tolist(),
        step.block_table.tolist(),
        step.seq_lens.tolist(),
        step.query_start_loc.tolist(),
        [(source, target) for source, target in step.copies.tolist()],
        step.num_seqs,
        step.num_tokens,
        step.max_query_len,
        step.max_seq_len,
    )


COMPILED = Driver(BlockManager, make_step, read_step)
