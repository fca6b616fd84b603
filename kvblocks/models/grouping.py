"""Which layers share a block table, how large a block is then, and how many of them a sequence takes. Integers only.

A block holds `block_size` tokens for the layers of one group; all groups draw from one pool, so a block is as large as
the largest group needs. Layers of one reach form groups of equally many layers; the best number is found by trying all.
Layers that keep more bytes than others take more room in their block, so that there are fewer of them in a group.

Groups depend on the model alone, not on what is asked of it: a store that several processes share names its blocks by
them. The planner, `kvblocks.generate` and `PagedCache` all ask `layer_groups`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvblocks.config import Chunk, blocks_held
from kvblocks.formats import format_of
from kvblocks.models.shapes import Kept, Layer, Reach

__all__ = [
    "MOST_GROUPS",
    "BlockGroup",
    "Layout",
    "PagedLayer",
    "layer_groups",
    "model_groups",
    "paged_layers",
    "uniform_bytes",
]

MOST_GROUPS = 12  # each is a block table in every step
_LENGTH = 32768  # tokens of the sequence whose bytes are compared, where the model allows as many
_BLOCK_SIZE = 16  # tokens of the blocks in which it is counted


@dataclass(frozen=True)
class PagedLayer:
    """What one layer puts into the blocks of one group.

    Args:
        index: the layer's index in the model.
        reach: how far it attends.
        block_bytes: bytes that it takes in one block.
    """

    index: int
    reach: Reach
    block_bytes: int


@dataclass(frozen=True)
class BlockGroup:
    """Layers that share a block table."""

    reach: Reach
    layers: tuple[PagedLayer, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block that its layers use."""
        return sum(layer.block_bytes for layer in self.layers)


@dataclass(frozen=True)
class Layout:
    """Groups over one pool.

    Args:
        groups: by reach, the farthest first.
        block_size: tokens in a block.
        step_tokens: tokens that one step writes for a sequence, at most.
    """

    groups: tuple[BlockGroup, ...]
    block_size: int
    step_tokens: int = 1
    pooled: ClassVar[bool] = True  # all groups draw blocks of one size from one pool

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool; 0 where nothing is paged."""
        return max((group.block_bytes for group in self.groups), default=0)

    def blocks_of(self, group: BlockGroup, num_tokens: int) -> int:
        """Blocks of one group that a sequence holds at most on its way to `num_tokens` tokens."""
        return blocks_held(group.reach, num_tokens, self.block_size, self.step_tokens)

    def blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence holds at most on its way to `num_tokens` tokens."""
        return sum(self.blocks_of(group, num_tokens) for group in self.groups)

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes of all blocks that a sequence holds at most on its way to `num_tokens` tokens."""
        return self.blocks(num_tokens) * self.block_bytes

    def bytes_for(self, count: int, num_tokens: int) -> int:
        """Bytes that `count` sequences take."""
        return count * self.held_bytes(num_tokens)


def layer_groups(
    layers: Sequence[PagedLayer], longest: int | None, max_groups: int = MOST_GROUPS
) -> tuple[BlockGroup, ...]:
    """The groups in which a sequence takes the fewest bytes, by reach, the farthest first.

    It tries each block size in bytes at which the layers of some reach need one group fewer, while there are at most
    `max_groups` groups in all (or as many as there are reaches). Of two that take the same, the one with fewer groups
    is taken. Layers keep their order; where all of a reach are of one size its groups have equally many, or one fewer.

    Args:
        layers: of the model, or of the part of it that one device runs. Only the ratios of their `block_bytes` count.
        longest: tokens of the longest sequence that the model was made for; None where it names none. The sequence that
            is compared has so many tokens, and 32,768 at most. It lies in blocks of 16 and grows a token at a time.
        max_groups: block tables of a sequence, at most; layers of each reach need at least one.
    """
    num_tokens = _LENGTH if longest is None else min(longest, _LENGTH)
    by_reach: dict[Reach, list[PagedLayer]] = {}
    for layer in sorted(layers, key=lambda layer: (_order(layer.reach), layer.index)):
        by_reach.setdefault(layer.reach, []).append(layer)
    allowed = max(max_groups, len(by_reach))
    best: tuple[int, int, tuple[BlockGroup, ...]] = (0, 0, ())
    for room in sorted({room for same in by_reach.values() for room in _rooms(same, allowed)}, reverse=True):
        groups = tuple(group for same in by_reach.values() for group in _packed(same, room))
        if len(groups) > allowed:
            continue
        cost = (Layout(groups, _BLOCK_SIZE).held_bytes(num_tokens), len(groups))
        if not best[2] or cost < best[:2]:
            best = (*cost, groups)
    return best[2]


def model_groups(
    layers: Sequence[Layer], longest: int | None, max_groups: int = MOST_GROUPS
) -> tuple[tuple[Reach, tuple[int, ...]], ...]:
    """`layer_groups` of a model's layers: of each group the reach, and the layers by their index in the model.

    Bytes are those of the whole model in bfloat16, whatever it is stored in and over however many devices.
    """
    bfloat16 = format_of("bfloat16")
    rates = math.lcm(*(kept.every for layer in layers for kept in layer.kept))
    found = layer_groups(paged_layers(layers, rates, lambda kept: kept.entry_bytes(bfloat16)), longest, max_groups)
    return tuple((group.reach, tuple(layer.index for layer in group.layers)) for group in found)


def paged_layers(
    layers: Iterable[Layer], block_size: int, entry_bytes: Callable[[Kept], int]
) -> tuple[PagedLayer, ...]:
    """What every layer puts into blocks of `block_size` tokens, one entry for each of its reaches."""
    found = []
    for layer in layers:
        for reach in dict.fromkeys(kept.reach for kept in layer.kept):
            same = [kept for kept in layer.kept if kept.reach == reach]
            block = sum(entry_bytes(kept) * math.ceil(block_size / kept.every) for kept in same)
            found.append(PagedLayer(layer.index, reach, block))
    return tuple(found)


def uniform_bytes(layers: Sequence[PagedLayer], block_size: int, num_tokens: int) -> int:
    """Bytes of a sequence if every layer kept every token, and each took as many bytes as the largest."""
    if not layers:
        return 0
    each = max(layer.block_bytes for layer in layers)
    return len(layers) * each * math.ceil(num_tokens / block_size)


def _rooms(layers: Sequence[PagedLayer], most_groups: int) -> set[int]:
    """For every number of groups, the smallest block into which each of them fits."""
    sizes = {layer.block_bytes for layer in layers}
    numbers = range(1, min(len(layers), most_groups) + 1)
    if len(sizes) == 1:
        return {math.ceil(len(layers) / number) * size for number in numbers for size in sizes}
    rooms = set()
    for number in numbers:
        low, high = max(layer.block_bytes for layer in layers), sum(layer.block_bytes for layer in layers)
        while low < high:
            middle = (low + high) // 2
            if len(_filled(layers, middle)) <= number:
                high = middle
            else:
                low = middle + 1
        rooms.add(low)
    return rooms


def _filled(layers: Sequence[PagedLayer], room: int) -> list[list[PagedLayer]]:
    """Layers in order, as many to a group as fit into `room` bytes; one that is larger than that is alone."""
    groups: list[list[PagedLayer]] = []
    left = -1
    for layer in layers:
        if layer.block_bytes > left:
            groups.append([])
            left = room
        groups[-1].append(layer)
        left -= layer.block_bytes
    return groups


def _packed(layers: Sequence[PagedLayer], room: int) -> list[BlockGroup]:
    """The fewest groups that fit into `room` bytes, evenly filled where all layers are of one size."""
    groups = _filled(layers, room)
    if len({layer.block_bytes for layer in layers}) == 1:
        at = [len(layers) * i // len(groups) for i in range(len(groups) + 1)]
        groups = [list(layers[start:end]) for start, end in pairwise(at)]
    return [BlockGroup(layers[0].reach, tuple(group)) for group in groups]


def _order(reach: Reach) -> tuple[int, int, int]:
    """Farthest first."""
    if reach is None:
        return (0, 0, 0)
    return (1, -reach.size, int(isinstance(reach, Chunk)))
