"""Tests of the tests: the state machine must find bugs planted in a manager, one for each invariant and more.

The mutants are subclasses of the plain-Python model, each with one line wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from manager_machine import MODEL, Driver, machine_for
from manager_model import GONE, BlockKey, ModelManager, Node, OpenStep, Seq

from kvblocks.config import Chunk
from kvblocks.errors import InvariantViolation

# Bounded and the same every time; the first failure is enough, so nothing is spent on making it smaller.
SETTINGS = settings(
    max_examples=4000,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def run(
    subject: Callable[..., ModelManager],
    reference: Callable[..., ModelManager] = ModelManager,
    settings: settings = SETTINGS,
    tiers: bool | None = False,
) -> None:
    machine = machine_for(Driver(subject, MODEL.step, MODEL.read), partial(reference, checking=False), tiers, False)
    run_state_machine_as_test(machine, settings=settings)


class ForkForgetsAReference(ModelManager):
    def _child(self, parent: Seq, handle: int) -> Seq:
        child = super()._child(parent, handle)
        for block in [block for row in child.table for block in row if block != GONE][-1:]:
            self.refs[block] -= 1
        return child


class WaitingBlockIsLost(ModelManager):
    def _set_free(self, block: int, naming: OpenStep | None) -> None:
        if naming is None:
            super()._set_free(block, naming)


class EvictionLeavesTheBlock(ModelManager):
    def _unpublish(self, block: int) -> None:
        self.node_of.pop(block)


class EvictionLeavesTheNode(ModelManager):
    def _prune(self, node: Node) -> None:
        pass


class ParentIsReleasedFirst(ModelManager):
    def _drop_from_end(self, sequence: Seq, num_blocks: int) -> None:
        for row in sequence.table[num_blocks:]:
            self._drop_row(row)
        del sequence.table[num_blocks:]


class CutKeepsTheTail(ModelManager):
    def _cut(self, sequence: Seq, num_tokens: int) -> None:
        table = [list(row) for row in sequence.table]
        for block in (block for row in table for block in row if block != GONE):
            self._hold(block)
        super()._cut(sequence, num_tokens)
        for row in table[: len(sequence.table)]:
            self._drop_row(row)
        sequence.table += table[len(sequence.table) :]


class PublishedBlockIsWritten(ModelManager):
    def _must_copy(self, sequence: Seq, g: int) -> bool:
        index = sequence.num_prepared // self.block_size
        return index < len(sequence.table) and self.refs[sequence.table[index][g]] > 1


class SharedBlockIsWritten(ModelManager):
    def _must_copy(self, sequence: Seq, g: int) -> bool:
        index = sequence.num_prepared // self.block_size
        return index < len(sequence.table) and sequence.table[index][g] in self.node_of


class LastSlotTwice(ModelManager):
    def _slot(self, sequence: Seq, g: int, position: int) -> int:
        last = self.block_size > 1 and position % self.block_size == self.block_size - 1
        return super()._slot(sequence, g, position) - int(last)


class FailedAdmissionCounts(ModelManager):
    def _find_room(
        self, sequence: Seq, reserve: int | None, max_hit: int | None, watermark: int, host: bool
    ) -> tuple[list[Node], int]:
        self.counts["prompt_tokens"] += 1
        found = super()._find_room(sequence, reserve, max_hit, watermark, host)
        self.counts["prompt_tokens"] -= 1
        return found


class FailedExtendKeepsSome(ModelManager):
    def _extend(self, batch: list[Seq], tokens: Any, counts: list[int], extra: Any) -> None:
        first = batch[0] if batch else None
        place = len(first.tokens) if first else 0
        if first:
            first.tokens.append(0)
        super()._extend(batch, tokens, counts, extra)
        if first:
            del first.tokens[place]


class SaltIsIgnored(ModelManager):
    def _find(
        self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_blocks: int, host: bool = False
    ) -> list[Node]:
        return super()._find(tokens, b"", extra, max_blocks, host)

    def _parent_node(self, sequence: Seq, index: int) -> Node:
        sequence.salt = b""
        return super()._parent_node(sequence, index)


class ExtraIsIgnored(ModelManager):
    def _block_key(self, tokens: list[int], extra: dict[int, bytes], index: int) -> BlockKey:
        return super()._block_key(tokens, {}, index)


class ExtraOutlivesItsToken(ModelManager):
    def _cut(self, sequence: Seq, num_tokens: int) -> None:
        extra = sequence.extra
        super()._cut(sequence, num_tokens)
        sequence.extra = extra


class WholePromptIsHit(ModelManager):
    def _hit(
        self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_hit: int | None, host: bool
    ) -> list[Node]:
        return self._find(tokens, salt, extra, len(tokens) // self.block_size, host)


class BlockDoesNotWait(ModelManager):
    def _set_free(self, block: int, naming: OpenStep | None) -> None:
        super()._set_free(block, None)


class OldSequencesPublishAfterReset(ModelManager):
    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        for sequence in self._all_sequences():
            sequence.may_publish = True


class SharedBlockIsPublished(ModelManager):
    def _is_alone(self, block: int) -> bool:
        return True


class OneNodeTooMany(ModelManager):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_nodes += 1


class NewestIsEvicted(ModelManager):
    def _take(self, sequence: Seq) -> int:
        self.idle.reverse()
        block = super()._take(sequence)
        self.idle.reverse()
        return block


class StepIdIsReused(ModelManager):
    def abort(self, step_id: int) -> list[int]:
        preempted = super().abort(step_id)
        self.last_step_id -= 1
        return preempted


class WindowIsOneShort(ModelManager):
    """A block is given back one token too early."""

    def _first_row(self, g: int, position: int) -> int:
        return super()._first_row(g, position + 1)


class WindowedBlocksStay(ModelManager):
    def _slide(self, sequence: Seq) -> None:
        pass


class ChunkIsAWindow(ModelManager):
    def _first_row(self, g: int, position: int) -> int:
        reach = self.groups[g]
        if not isinstance(reach, Chunk):
            return super()._first_row(g, position)
        return max(0, position - reach.size + 1) // self.block_size


class HitAsksTheFirstGroupOnly(ModelManager):
    def _serves(self, path: list[Node], host: bool, loads_state: bool | None = None) -> bool:
        return all(node.blocks[0] is not None for node in path[self._first_row(0, len(path) * self.block_size) :])

    def _needed(self, path: list[Node]) -> list[list[int | None]]:
        return [[GONE if block is None else block for block in row] for row in super()._needed(path)]


class GroupsShareABlockOfTheirNode(ModelManager):
    """What hangs there for one group is taken for another."""

    def _hang(self, sequence: Seq, node: Node, g: int, own: int) -> None:
        super()._hang(sequence, node, g if node.blocks[0] is None else 0, own)


class TrimForgetsTheWindow(ModelManager):
    def trim(self, seq: int, num_tokens: int) -> None:
        sequence = self._sequence(seq)
        if not 0 <= num_tokens <= len(sequence.tokens) or self._steps_of(sequence):
            raise ValueError("the model's other checks")
        self._cut(sequence, num_tokens)


class HandleIsReused(ModelManager):
    def _new_handle(self) -> int:
        self.generations.clear()
        return super()._new_handle()


class BlockOfOthersIsWrittenInPlace(ModelManager):
    """The last row writes in place though somebody outside of the step holds the block too."""

    def _in_place(self, batch: list[Seq]) -> dict[int, Seq]:
        found: dict[int, Seq] = {}
        for sequence in batch:
            if self._must_copy(sequence, 0):
                block = sequence.table[sequence.num_prepared // self.block_size][0]
                if block not in self.node_of:
                    found[block] = sequence
        return found


class EverybodyCopies(ModelManager):
    """k + 1 copies for k children of a partly filled block."""

    def _in_place(self, batch: list[Seq]) -> dict[int, Seq]:
        return {}


class AddedExtraIsForgotten(ModelManager):
    """Extra bytes count for the prompt, and not for tokens that come later."""

    def _extend(self, batch: list[Seq], tokens: Any, counts: list[int], extra: Any) -> None:
        super()._extend(batch, tokens, counts, None)


class AddedExtraComesTooEarly(ModelManager):
    """Positions of added extra bytes count from the start of the last block."""

    def _extend(self, batch: list[Seq], tokens: Any, counts: list[int], extra: Any) -> None:
        super()._extend(batch, tokens, counts, None)
        for sequence, count, pairs in zip(batch, counts, extra or [()] * len(batch), strict=True):
            start = (len(sequence.tokens) - count) // self.block_size * self.block_size
            sequence.extra |= {start + place: data for place, data in pairs}


class LongestHitIsIgnored(ModelManager):
    """A hit is as long as it can be, whatever `max_hit` says."""

    def _hit(
        self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_hit: int | None, host: bool
    ) -> list[Node]:
        return super()._hit(tokens, salt, extra, None, host)


class AnswerCountsForNothing(ModelManager):
    """A prompt that fits is never called too long, however long its answer."""

    def blocks_needed(self, num_tokens: int, *, reserve: int | None = None, max_new_tokens: int = 1) -> int:
        return super().blocks_needed(num_tokens, reserve=reserve)


class ForgottenCopiesAreCommitted(ModelManager):
    """A pass whose copies were never made counts as computed."""

    def commit(self, step_id: int, accepted: Any = None) -> list[int]:
        self.moves_marked = self.moves_handed
        return super().commit(step_id, accepted)


INVARIANTS: list[tuple[type[ModelManager], int]] = [
    (ForkForgetsAReference, 1),
    (WaitingBlockIsLost, 2),
    (EvictionLeavesTheBlock, 3),
    (EvictionLeavesTheNode, 3),
    (ParentIsReleasedFirst, 4),
    (CutKeepsTheTail, 5),
    (WindowedBlocksStay, 5),
    (PublishedBlockIsWritten, 6),
    (SharedBlockIsWritten, 6),
    (LastSlotTwice, 7),
    (FailedAdmissionCounts, 8),
    (FailedExtendKeepsSome, 8),
]
OTHERS: list[type[ModelManager]] = [
    SaltIsIgnored,
    ExtraIsIgnored,
    ExtraOutlivesItsToken,
    WholePromptIsHit,
    BlockDoesNotWait,
    OldSequencesPublishAfterReset,
    SharedBlockIsPublished,
    OneNodeTooMany,
    NewestIsEvicted,
    StepIdIsReused,
    HandleIsReused,
    WindowIsOneShort,
    ChunkIsAWindow,
    HitAsksTheFirstGroupOnly,
    GroupsShareABlockOfTheirNode,
    TrimForgetsTheWindow,
    ForgottenCopiesAreCommitted,
    AddedExtraIsForgotten,
    AddedExtraComesTooEarly,
    LongestHitIsIgnored,
    AnswerCountsForNothing,
    BlockOfOthersIsWrittenInPlace,
    EverybodyCopies,
]
# Seen in the K/V alone, without a right manager to compare with.
MISREAD: list[type[ModelManager]] = [
    PublishedBlockIsWritten,
    SharedBlockIsWritten,
    LastSlotTwice,
    SaltIsIgnored,
    ExtraIsIgnored,
    ExtraOutlivesItsToken,
    AddedExtraIsForgotten,
    BlockOfOthersIsWrittenInPlace,
    BlockDoesNotWait,
    OldSequencesPublishAfterReset,
    WindowIsOneShort,
]


def silent(mutant: type[ModelManager]) -> Callable[..., ModelManager]:
    """The mutant without any check of its own."""

    def audit(self: ModelManager) -> None:
        pass

    return partial(type(mutant.__name__, (mutant,), {"audit": audit}), checking=False)


@pytest.mark.parametrize(("mutant", "invariant"), INVARIANTS)
def test_audit_names_the_broken_invariant(mutant: type[ModelManager], invariant: int) -> None:
    with pytest.raises(InvariantViolation) as caught:
        run(mutant, mutant)
    assert caught.value.invariant == invariant


@pytest.mark.parametrize("mutant", [mutant for mutant, _ in INVARIANTS] + OTHERS)
def test_comparison_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant))


@pytest.mark.parametrize("mutant", MISREAD)
def test_device_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"reads another prefix|still names"):
        run(silent(mutant), silent(mutant))


def test_nothing_is_found_in_the_model_itself() -> None:
    run(ModelManager, settings=settings(SETTINGS, max_examples=60), tiers=None)
