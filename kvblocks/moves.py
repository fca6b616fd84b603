"""HostMoves: copies of blocks and states between a device and slots of host memory, in the order of the manager.

On CUDA they run on a stream of their own, beside that of the passes, and the host waits for neither. Streams and events
are used through `MoveStream` alone: on the CPU moves are done when a call returns, on CUDA when the stream has reached
them. Knows blocks and slots by their numbers, not what is in them. Imports torch, the compiled mover, the arena and
the kernels.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvblocks.kernels import kernels
from kvblocks.movement import move_blocks
from kvblocks.sizes import HEADER_BYTES
from kvblocks.storage.block_memory import BlockMemory
from kvblocks.storage.host import HostArena

__all__ = ["HostMoves", "MovePlaces", "MoveStream", "move_stream"]


@dataclass(frozen=True)
class MovePlaces:
    """The two ends of moves: the blocks of all layer groups and host slots for them, or slots for states and theirs.

    Attributes:
        memory: of the blocks.
        count: blocks that there are.
        arena: the slots.
    """

    memory: BlockMemory
    count: int
    arena: HostArena


class MoveStream(Protocol):
    """The stream on which moves run; passes run on the current stream.

    A mark is a point of the stream, as an event is on CUDA.
    """

    def follow(self) -> None:
        """Let moves that are run from now on begin after all that is on the current stream now."""

    def run(self, moves: Tensor) -> None:
        """Do moves in order, after all that were run before: int32 [n, 4] on the host, contiguous, n >= 1."""

    def mark(self) -> Any:
        """The point after all moves that were run so far."""

    def hold(self, mark: Any) -> None:
        """Let what is put on the current stream from now on begin after a mark."""

    def passed(self, mark: Any) -> bool:
        """Whether all moves before a mark are done; does not wait."""

    def finish(self) -> None:
        """Wait until all moves that were run are done."""


class HostMoves:
    """Moves between the blocks of an engine and the slots of an arena.

    Args:
        stream: where they run.
        memory: what is kept alive until the last move is done.

    A step enqueues the same few operations however many moves it has: the stream follows the current one, does the
    moves that the pass waits for, then the others, and the current stream waits for those that it needs.
    """

    def __init__(self, stream: MoveStream, memory: object) -> None:
        self._stream = stream
        self._marks: deque[tuple[int, Any]] = deque()  # of moves up to a number, oldest first
        self._landed = 0
        weakref.finalize(self, _finish, stream, memory)

    def enqueue(self, moves: Tensor, first: int, last: int, needs: int) -> None:
        """Do moves, those that the next pass needs before the others.

        Args:
            moves: int32 [n, 4]: kind (0 from a block to a slot, 1 back), group, source, target, which must exist. The
                group after the last one is that of states.
            first, last: the range of this step's numbers, both included; not every number in it has a move here.
            needs: the newest move that the pass waits for, at most `last`; 0 for none.
        """
        self.landed()  # so that marks do not pile up where nobody calls it
        if len(moves):
            self._stream.follow()
            needed = self._needed(moves, needs - first + 1)
            for some, number in ((moves[:needed], needs if needed < len(moves) else last), (moves[needed:], last)):
                if len(some):
                    self._stream.run(some)
                    self._marks.append((number, self._stream.mark()))

    def hold(self, needs: int) -> None:
        """Let the pass that is launched next wait for the enqueued moves up to number `needs`."""
        if needs > self._landed and self._marks:
            # Numbers above that of the newest mark are of moves that the passes' own stream makes.
            self._stream.hold(next((mark for number, mark in self._marks if number >= needs), self._marks[-1][1]))

    def run(self, moves: Tensor) -> None:
        """Do moves that no manager has numbered, and wait until they are done."""
        self._stream.follow()
        self._stream.run(moves)
        self._stream.finish()

    def landed(self) -> int:
        """The number of the newest move that is done together with all before it, 0 for none."""
        while self._marks and self._stream.passed(self._marks[0][1]):
            self._landed = self._marks.popleft()[0]
        return self._landed

    @staticmethod
    def _needed(moves: Tensor, count: int) -> int:
        """How many moves have to run before the pass: those up to the `count`-th and, unless there are none, all loads.

        Loads come before offloads, in any order of their numbers. As numbers may have gaps, the i-th offload has the
        number of its index in `moves` or a larger one.
        """
        if count <= 0:
            return 0
        loads = moves[:, 0].nonzero()
        return max(min(count, len(moves)), int(loads[-1]) + 1 if len(loads) else 0)


def move_stream(places: Sequence[MovePlaces], device: torch.device) -> MoveStream:
    """The stream for moves between a device and host memory.

    Args:
        places: of blocks, then of states if these are moved; groups number through them.
        device: where the blocks lie.

    Raises:
        NotImplementedError: the device is neither the CPU nor CUDA, or Triton, which CUDA needs, is not installed.
        ValueError: a CUDA device, and an arena that is not pinned.
    """
    if device.type == "cpu":
        return CpuStream(places)
    if device.type != "cuda":
        raise NotImplementedError(f"blocks are not moved between {device} and host memory; use CPU or CUDA")
    for place in places:
        if not place.arena.pinned:
            raise ValueError(f"{place.arena} is not pinned, so {device} cannot reach it; leave pinned out, or set it")
    return CudaStream(places, device)


def _apart(moves: Tensor, places: Sequence[MovePlaces]) -> list[Tensor]:
    """The moves of each of the places, with groups that number from 0 there."""
    if len(places) == 1:
        return [moves]
    parts, first = [], 0
    for place in places:
        end = first + len(place.memory.sizes)
        own = moves[(moves[:, 1] >= first) & (moves[:, 1] < end)]
        own[:, 1] -= first
        parts.append(own)
        first = end
    return parts


class CpuStream:
    """Compiled copies, which are done when a call returns."""

    def __init__(self, places: Sequence[MovePlaces]) -> None:
        self._places = places
        self._pieces = [torch.tensor(place.memory.pieces, dtype=torch.int64) for place in places]
        self._sizes = [torch.tensor(place.memory.sizes, dtype=torch.int64) for place in places]

    def follow(self) -> None: ...

    def run(self, moves: Tensor) -> None:
        parts = _apart(moves, self._places)
        for place, pieces, sizes, part in zip(self._places, self._pieces, self._sizes, parts, strict=True):
            move_blocks(
                pieces.data_ptr(),
                len(pieces),
                place.count,
                place.arena.address + HEADER_BYTES,
                place.arena.slot_bytes,
                place.arena.num_slots,
                sizes.data_ptr(),
                len(sizes),
                part.data_ptr(),
                len(part),
            )

    def mark(self) -> None: ...

    def hold(self, mark: None) -> None: ...

    def passed(self, mark: None) -> bool:
        return True

    def finish(self) -> None: ...


class CudaStream:
    """A stream of its own; one copy and one launch for each `run`, two where it moves blocks and states."""

    def __init__(self, places: Sequence[MovePlaces], device: torch.device) -> None:
        module = kernels("slots")
        if module is None:
            raise NotImplementedError(
                "on CUDA a Triton kernel moves blocks to the host, and Triton is not installed; `pip install triton`"
            )
        self._kernels, self._places, self._device = module, places, device
        self._chunks = [module.Chunks.of(place.memory.pieces, place.memory.sizes, device) for place in places]
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.follow()  # the current stream, on which the tables and the blocks were filled

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, moves: Tensor) -> None:
        # torch reuses pinned memory only after the copies out of it, and the table only on this stream.
        with torch.cuda.stream(self._stream):
            for place, chunks, part in zip(self._places, self._chunks, _apart(moves, self._places), strict=True):
                if len(part):
                    table = part.pin_memory().to(self._device, non_blocking=True)
                    address = place.arena.address + HEADER_BYTES
                    self._kernels.move_blocks(chunks, address, place.arena.slot_bytes, table)

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def hold(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def passed(self, mark: torch.cuda.Event) -> bool:
        done: bool = mark.query()  # type: ignore[no-untyped-call]
        return done

    def finish(self) -> None:
        self._stream.synchronize()


def _finish(stream: MoveStream, memory: object) -> None:
    stream.finish()
