"""What a device would hold while a block manager is driven: the K/V of each slot, by identity. Knows no manager."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from kvblocks.config import Chunk, Window

ZERO = -1  # what a state that has seen no token holds


@dataclass
class Truth:
    """What a sequence's tokens really are, also where the manager does not know them yet."""

    salt: bytes
    tokens: list[int]
    extra: dict[int, bytes]
    weights: int  # of the model when it was admitted or resumed; a reset of the prefix cache brings new ones
    written: int = 0  # K and V of the tokens before this have been written, or are by an open step

    def copy(self) -> "Truth":
        return Truth(self.salt, list(self.tokens), dict(self.extra), self.weights, self.written)

    def cut(self, num_tokens: int) -> None:
        del self.tokens[num_tokens:]
        self.extra = {p: data for p, data in self.extra.items() if p < num_tokens}
        self.written = min(self.written, num_tokens)


@dataclass
class RunRow:
    """A row of an open step: what it was given to read, and what that must be."""

    handle: int
    start: int
    end: int
    tables: list[list[int]]  # of each group
    contents: list[int]  # identities of positions 0..end
    state: int = -1  # the slot of the state that it goes on from
    drafts: list[int] = field(default_factory=list)  # slots of the state after each token, where they are kept


def first_reached(reach: Window | Chunk | None, position: int) -> int:
    """The first position that the query at `position` attends to."""
    if isinstance(reach, Window):
        return max(0, position - (reach.size - 1))
    if isinstance(reach, Chunk):
        return max(p for p in range(position + 1) if p % reach.size == 0)
    return 0


@dataclass
class Device:
    """The K/V, by identity: a slot holds a group and a number that stands for one exact prefix (weights, salt, tokens,
    extra)."""

    block_size: int
    groups: Sequence[Window | Chunk | None]
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    host: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # what each host slot holds, token by token
    states: dict[int, int] = field(default_factory=dict)  # what each slot of states has seen: one exact prefix
    host_states: dict[int, int] = field(default_factory=dict)  # the same of slots in host memory
    names: dict[tuple[Any, ...], int] = field(default_factory=dict)
    fresh: Iterator[int] = field(default_factory=count)

    def identities(self, truth: Truth) -> list[int]:
        found: list[int] = []
        name = self.names.setdefault((truth.weights, truth.salt), next(self.fresh))
        for position, token in enumerate(truth.tokens):
            key = (name, token, truth.extra.get(position))
            name = self.names.setdefault(key, next(self.fresh))
            found.append(name)
        return found

    def check_state(self, slot: int, contents: list[int], position: int, what: str) -> None:
        """Whether a slot has seen the first `position` tokens of `contents`, no more and no fewer."""
        seen = self.states.get(slot)
        right = contents[position - 1] if position else ZERO
        assert seen == right, f"{what}: state {slot} has not seen the {position} tokens before, but another prefix"

    def copy_states(self, zeroed: list[int], pairs: list[tuple[int, int]]) -> None:
        for slot in zeroed:
            self.states[slot] = ZERO
        for source, target in pairs:
            self.states[target] = self.states.get(source, -2)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            for offset in range(self.block_size):
                found = self.slots.get(source * self.block_size + offset, (-1, -1))
                self.slots[target * self.block_size + offset] = found

    def move(self, move: Any) -> None:
        """A block, or a state, to a host slot or back: all that lies there, whatever it is."""
        if move.group == len(self.groups):
            origin, end = (self.host_states, self.states) if move.loads else (self.states, self.host_states)
            end[move.target] = origin.get(move.source, -2)
            return
        block = move.target if move.loads else move.source
        places = range(block * self.block_size, (block + 1) * self.block_size)
        if move.loads:
            self.slots.update(zip(places, self.host.get(move.source, [(-1, -1)] * self.block_size), strict=True))
        else:
            self.host[move.target] = [self.slots.get(place, (-1, -1)) for place in places]

    def reached(self, tables: Sequence[Sequence[int]], start: int) -> Iterator[int]:
        """Blocks that queries from `start` on may read."""
        for reach, table in zip(self.groups, tables, strict=True):
            yield from table[first_reached(reach, start) // self.block_size :]

    def check(self, tables: Sequence[Sequence[int]], contents: list[int], start: int, what: str) -> None:
        """Whether all that queries from `start` on reach is what it should be."""
        for g, table in enumerate(tables):
            for position in range(first_reached(self.groups[g], start), len(contents)):
                slot = table[position // self.block_size] * self.block_size + position % self.block_size
                right = self.slots.get(slot) == (g, contents[position])
                assert right, f"{what}: position {position} of group {g} reads another prefix in slot {slot}"
