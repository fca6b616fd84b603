"""What a device would hold while a block manager is driven: the K/V of each slot, by identity. Knows no manager."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any


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
    table: list[int]
    contents: list[int]  # identities of positions 0..end


@dataclass
class Device:
    """The K/V, by identity: a slot holds a number that stands for one exact prefix (weights, salt, tokens, extra)."""

    block_size: int
    slots: dict[int, int] = field(default_factory=dict)
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

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            for offset in range(self.block_size):
                self.slots[target * self.block_size + offset] = self.slots.get(source * self.block_size + offset, -1)

    def check(self, table: Sequence[int], contents: list[int], what: str) -> None:
        for position, name in enumerate(contents):
            slot = table[position // self.block_size] * self.block_size + position % self.block_size
            assert self.slots.get(slot) == name, f"{what}: position {position} reads another prefix in slot {slot}"
