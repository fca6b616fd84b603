"""Tests of the tests: the state machine must find bugs planted in what a manager does with work in the background."""

from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from manager_machine import Action, ManagerMachine
from manager_model import ModelFetch, ModelManager, ModelSpill, Node
from manager_streams import Streams
from test_planted_bugs import silent
from test_planted_tier_bugs import run

from kvblocks.config import Window


class LateStreams(Streams):
    def run_some(self) -> None:
        if self.rng.random() < 0.02:
            super().run_some()


class Busy(ManagerMachine):
    """Small pools, a late device, and more work in the background than anybody has."""

    patience = 0.1

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = Random(seed)
        choice = self.rng.choice
        self.groups = choice([(None,), (None,), (None, Window(3)), (Window(3),)])
        self.large = False
        self.block_size, self.vocabulary, self.honest = 1, 2, True
        self.favourites = self.rng.sample(BACKGROUND, 2)
        num_blocks = choice([4, 6]) * len(self.groups)
        self.open(num_blocks, {"groups": self.groups, "max_seqs": 4, "host_blocks": choice([8, 12, 16])})
        self.streams = LateStreams(self.rng)

    def turn_over(self) -> None:
        """Twins are fetched; and now and then a reset comes between a begin and its end, and others want the slots."""
        super().turn_over()
        for _ in range(self.rng.choice([0, 2])):
            self.begin_fetch()
        if self.missed() and self.coin():
            self.stored = self.missed()[:1]
            self.end_all()
            for step in [self.begin_fetch] * 2 + [self.end_fetch] * 2:
                step()
        elif self.coin():
            self.weights += 1
            self.stored.clear()
            self.both("reset_prefix_cache")
            for _ in range(6):
                self.pass_by()
                self.background.run_some()
            self.time_passes()

    def weight(self, a: Action) -> int:
        return super().weight(a) * (4 if a.name in BACKGROUND else 1)


BACKGROUND = ["turn_over", "begin_fetch", "end_fetch", "admit_fetched", "begin_spill", "end_spill"]


class SlotInFlightIsFetchedInto(ModelManager):
    """A slot is given to the background while moves that name it have not landed: the one used last."""

    def _take_landed(self, count: int, states: bool = False) -> list[int]:
        late = [slot for slot in self.host_slots if self.move_of_slot[slot] > self.moves_landed]
        late = [slot for slot in late if not self.holds[slot]][-count:] if count else []
        for slot in late:
            self._drop_slot(slot)
            self.host_unused.remove(slot)
        return late + super()._take_landed(count - len(late))


class SlotInFlightIsSpilled(ModelManager):
    def begin_spill(self, max_blocks: int, **options: Any) -> ModelSpill:
        landed, self.moves_landed = self.moves_landed, self.moves_noted
        spill = super().begin_spill(max_blocks, **options)
        self.moves_landed = landed
        return spill


class SpilledSlotIsEvicted(ModelManager):
    """A slot that is being read is given to another block."""

    def _oldest_slot(self, states: bool = False) -> int | None:
        return self.host_slots[0] if self.host_slots else None

    def _let_go_slot(self, slot: int) -> None:
        super()._let_go_slot(slot)
        if self.host_unused.count(slot) > 1:
            self.host_unused.pop()


class NodeIsNotHeld(ModelManager):
    """Nobody holds the node for whose block a slot was found: another one may be there when the block has come."""

    def _holders(self) -> list[Node]:
        held = [fetch.path[-1] for fetch in self.fetches if fetch.path]
        holders = super()._holders()
        return holders[: len(holders) - len(self.pins) - len(held)] + holders[len(holders) - len(self.pins) :]


class ParentIsEvicted(ModelManager):
    """What a fetch is to continue is not held: its blocks hang under a parent that no tier has."""

    def begin_fetch(self, tokens: Any, **options: Any) -> ModelFetch:
        fetch = super().begin_fetch(tokens, **options)
        for slot in fetch.held[len(fetch.blocks) :]:
            self._let_go_slot(slot)
        del fetch.held[len(fetch.blocks) :]
        return fetch


class AllIsHung(ModelManager):
    """Blocks are hung though what they continue did not come."""

    def _served(self, path: list[Node], host: bool) -> list[Node]:
        return path if any(fetch.path is path for fetch in self.fetches) else super()._served(path, host)


class EndedFetchIsNotHeld(ModelManager):
    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        tokens = super().end_fetch(fetch, num_ok)
        for slot in fetch.held:
            self._let_go_slot(slot)
        fetch.held = []
        return tokens


class HungFetchIsGivenUp(ModelManager):
    """The slots of a fetch that has not ended are free once another one begins."""

    def begin_fetch(self, tokens: Any, **options: Any) -> ModelFetch:
        for fetch in self.fetches:
            for slot in fetch.taken if not fetch.ended else []:
                if slot in fetch.held:
                    fetch.held.remove(slot)
                    self._let_go_slot(slot)
        return super().begin_fetch(tokens, **options)

    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        given_up = fetch.blocks and not set(fetch.held) & set(fetch.taken)
        if given_up and not fetch.ended:
            fetch.blocks, fetch.taken = [], []
            num_ok = 0
        return super().end_fetch(fetch, num_ok)


class ResetLetsOldFetchesHang(ModelManager):
    def reset_prefix_cache(self) -> None:
        paths = [list(fetch.path) for fetch in self.fetches]
        super().reset_prefix_cache()
        for fetch, path in zip(self.fetches, paths, strict=True):
            node = self._root(b"")
            for old in path:
                node = node.children.setdefault(old.key, Node(node, old.key, list(old.blocks), list(old.slots)))
                node.blocks, node.slots = [None] * len(self.groups), [None] * len(self.groups)
                fetch.path.append(node)


class TwinsHangBoth(ModelManager):
    """Of two fetches of one prefix the second replaces what the first has hung."""

    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        for index, g, _ in fetch.blocks[:num_ok] if fetch.path else []:
            fetch.path[index].slots[g] = None
        return super().end_fetch(fetch, num_ok)


class ChildrenOutliveParents(ModelManager):
    """What was fetched is evicted from the front: the rest of it is stranded."""

    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        path = list(fetch.path)
        tokens = super().end_fetch(fetch, num_ok)
        for node in path:
            for g in range(len(self.groups)):
                self._use_slot(node, g)
        return tokens


class SpillForgetsAncestors(ModelManager):
    """A digest is asked for without all that it is made of."""

    def _unnamed(self, node: Node, place: dict[int, int]) -> list[Node]:
        return super()._unnamed(node, place)[-1:]


class DigestOutlivesAReset(ModelManager):
    """What a spill said of a node is kept though the weights are new."""

    def end_spill(self, spill: ModelSpill, ok: Any, digests: Any = None) -> None:
        super().end_spill(spill, ok, digests)
        for node in self._all_nodes():
            for spilled, digest in zip(spill.nodes, digests or [], strict=False):
                same = node.parent is not None and node.parent.parent is None and spilled.salt is not None
                if same and spilled.tokens == self._spilled(node, {}).tokens:
                    node.digest = digest


class KnownBlocksAreSpilledAgain(ModelManager):
    def end_spill(self, spill: ModelSpill, ok: Any, digests: Any = None) -> None:
        super().end_spill(spill, [False] * len(ok), digests)


# Seen in what slots hold, without a right manager to compare with.
MISREAD: list[type[ModelManager]] = [
    SlotInFlightIsFetchedInto,
    SlotInFlightIsSpilled,
    SpilledSlotIsEvicted,
    HungFetchIsGivenUp,
    ResetLetsOldFetchesHang,
]
OTHERS: list[type[ModelManager]] = [
    NodeIsNotHeld,
    ParentIsEvicted,
    AllIsHung,
    EndedFetchIsNotHeld,
    TwinsHangBoth,
    ChildrenOutliveParents,
    SpillForgetsAncestors,
    DigestOutlivesAReset,
    KnownBlocksAreSpilledAgain,
]


@pytest.mark.parametrize("mutant", OTHERS)
def test_comparison_finds(mutant: type[ModelManager]) -> None:
    with pytest.raises((AssertionError, LookupError)):
        run(silent(mutant), engine=Busy)


@pytest.mark.parametrize("mutant", MISREAD)
def test_reads_find(mutant: type[ModelManager]) -> None:
    with pytest.raises(AssertionError, match=r"another prefix"):
        run(silent(mutant), silent(mutant), Busy)
