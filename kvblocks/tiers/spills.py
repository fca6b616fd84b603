"""A spill: blocks in host slots, and their way into stores.

This is what runs on the threads of `Workers`; when it begins and ends is decided in `kvblocks.tiers.tiers`. Knows keys,
buffers and stores. Imports the stores' side of tiers.
"""

from collections.abc import Iterable, Sequence

from kvblocks.manager import SpilledNode
from kvblocks.tiers.fetches import Slots
from kvblocks.tiers.guarded import GuardedStore
from kvblocks.tiers.names import PRIVATE_SALT
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.store import Status
from kvblocks.tiers.workers import Job, Task

__all__ = ["Spilling"]

_PRIVATE = bytes(32)  # kept as the digest of nodes under private salts, and of no block


class Spilling(Task):
    """Gives blocks to each store that does not have them.

    Attributes:
        ok: for each row whether a store has it, or none ever will, once it has ended.
        digests: of each node, once it has ended.
    """

    def __init__(
        self,
        slots: Slots,
        rows: Iterable[Iterable[int]],
        nodes: Sequence[SpilledNode],
        stores: Sequence[GuardedStore],
    ) -> None:
        super().__init__()
        self.rows: list[tuple[int, int, int]] = [(int(slot), int(group), int(node)) for slot, group, node in rows]
        self.ok = [False] * len(self.rows)
        self.digests: list[bytes] = []
        self._slots, self._nodes, self._stores = slots, nodes, stores

    def job(self) -> Job:
        slots = self._slots
        blocks = _blocks(slots.format, self._nodes)
        self.digests = [_PRIVATE if block is None else block.digest for block in blocks]
        asked: list[tuple[int, Block, int, memoryview]] = []  # row, block, group, memory
        for row, (slot, group, node) in enumerate(self.rows):
            block = blocks[node]
            if block is not None and slots.format.fits(block):
                asked.append((row, block, group, slots.object(slot, group)))
            else:
                self.ok[row] = True  # so that it is not tried again
        keys = [slots.key(block, group) for _, block, group, _ in asked]
        sealed: set[int] = set()
        for number, store in enumerate(self._stores):
            if not asked or not store.takes_objects:
                continue
            yield number
            known = store.lookup(keys)
            store.count(known=sum(known))
            new = [i for i, has in enumerate(known) if not has]
            for i in new:
                if i not in sealed:
                    _, block, group, memory = asked[i]
                    slots.format.seal(block, group, slots.shard, memory)
                    sealed.add(i)
            statuses = store.put([keys[i] for i in new], [asked[i][3] for i in new]) if new else []
            there = [i for i, has in enumerate(known) if has]
            there += [i for i, status in zip(new, statuses, strict=True) if status is Status.OK]
            for i in there:
                self.ok[asked[i][0]] = True


def _blocks(form: ObjectFormat, nodes: Sequence[SpilledNode]) -> list[Block | None]:
    """The blocks of nodes, of which parents come before their children; None for those of private salts."""
    blocks: list[Block | None] = []
    for node in nodes:
        if node.parent >= 0:
            above = blocks[node.parent]
            parent = _PRIVATE if above is None else above.digest
        elif node.parent_digest is not None:
            parent = node.parent_digest
        else:
            assert node.salt is not None
            parent = _PRIVATE if node.salt.startswith(PRIVATE_SALT) else form.root(node.salt)
        blocks.append(None if parent == _PRIVATE else form.block(parent, node.tokens, node.extra))
    return blocks
