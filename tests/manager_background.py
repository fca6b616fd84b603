"""What lies outside of a process, by identity, and the work in the background that takes it there and back. Knows no
manager: it reads and writes host slots, late and in parts."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

# A group and a number that stands for one exact prefix, for each token of a block.
Content = list[tuple[int, int]]
JUNK: Content = [(-2, -2)]


def digests(root: Any, blocks: Sequence[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The name of each block of a path, from the (tokens, extra bytes) of all of them."""
    above = hashlib.sha256(repr(root).encode()).digest()
    for tokens, extra in blocks:
        above = hashlib.sha256(above + len(extra).to_bytes(8, "little") + extra + tokens).digest()
        yield above


@dataclass(eq=False)
class Operation:
    """A fetch or a spill between its begin and its end, as the model and the subject know it."""

    ours: Any
    theirs: Any
    left: list[Callable[[], None]] = field(default_factory=list)  # of its rows, what was not done yet
    num_whole: int = 0  # leading rows of a fetch that are there
    hangs: bool = False  # it goes on writing as long as nobody has ended it
    names: list[bytes] = field(default_factory=list)  # of the nodes of a spill
    read: dict[int, Content] = field(default_factory=dict)  # rows of a spill that were read


class Background:
    """Operations that are under way, and a store of blocks: (digest, group) -> what it holds."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.store: dict[tuple[bytes, int], Content] = {}
        self.fetches: list[Operation] = []
        self.spills: list[Operation] = []
        self.fetched: list[Operation] = []  # ended, and held

    def run_some(self) -> None:
        """Time passes: some of the operations do some of their reads and writes."""
        for operation in self.fetches + self.spills:
            for _ in range(self.rng.choice([0, 0, 1, 2])):
                self.advance(operation)

    def advance(self, operation: Operation) -> None:
        if operation.left:
            i = self.rng.randrange(len(operation.left))
            operation.left[i]() if operation.hangs else operation.left.pop(i)()

    def finish(self, operation: Operation) -> None:
        while operation.left and not operation.hangs:
            self.advance(operation)
