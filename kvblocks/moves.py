"""HostMoves: blocks on their way between a device and slots of host memory, in the order that the manager gives.

A device has a stream for them, beside the one on which passes run, and no call waits for either on the host. Streams,
events and the passing of time go through `Lane` alone: here are those of the CPU, where all is done when a call
returns, and of CUDA. Knows blocks and slots by their numbers, not what is in them. Imports torch, the compiled mover,
the arena and the kernels.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvblocks.kernels import kernels
from kvblocks.movement import move_blocks
from kvblocks.sizes import HEADER_BYTES
from kvblocks.storage.host import HostArena

__all__ = ["HostMoves", "Lane", "lane"]


class Lane(Protocol):
    """The stream on which moves run, as seen from the current stream, on which passes run.

    Marks are points of the lane: what an event is on CUDA.
    """

    def follow(self) -> None:
        """Let what is run from now on begin after all that lies on the current stream now."""

    def run(self, moves: Tensor) -> None:
        """Do moves in their order, behind all that was run before: int32 [n, 4] on the host, contiguous, n >= 1."""

    def mark(self) -> Any:
        """The point behind all that was run so far."""

    def hold(self, mark: Any) -> None:
        """Let what comes to lie on the current stream from now on begin after a mark."""

    def passed(self, mark: Any) -> bool:
        """Whether all before a mark is done; asked without waiting."""

    def finish(self) -> None:
        """Wait until all that was run is done."""


class HostMoves:
    """Moves between the blocks of an engine and the slots of an arena.

    Args:
        lane: on which they run.
        arena: the slots, which stay until the last move is done.
        memory: what else has to stay so long.

    A step enqueues the same few things however many moves there are: the lane follows the current stream, does the
    moves that the pass waits for, then the others, and the current stream is held until the pass may run.
    """

    def __init__(self, lane: Lane, arena: HostArena, memory: object = None) -> None:
        self.arena = arena
        self._lane = lane
        self._marks: deque[tuple[int, Any]] = deque()  # of moves up to a number, oldest first
        self._landed = 0
        weakref.finalize(self, _finish, lane, arena, memory)

    def enqueue(self, moves: Tensor, first: int, last: int, needs: int) -> None:
        """Do moves, those that the next pass needs before the others.

        Args:
            moves: int32 [n, 4]: kind (0 from a block to a slot, 1 back), group, source, target; all of them there.
            first, last: the numbers of this step's moves; each but the last of `moves` may be followed by a gap.
            needs: the newest move that the pass waits for, at most `last`; 0 for none.
        """
        self.landed()  # so that marks do not pile up where nobody asks
        if len(moves):
            self._lane.follow()
            needed = self._needed(moves, needs - first + 1)
            for some, number in ((moves[:needed], needs if needed < len(moves) else last), (moves[needed:], last)):
                if len(some):
                    self._lane.run(some)
                    self._marks.append((number, self._lane.mark()))

    def hold(self, needs: int) -> None:
        """Let the pass that is launched next wait for the moves up to a number, which were enqueued here."""
        mark = next((mark for number, mark in self._marks if number >= needs), None)
        if needs > self._landed and mark is not None:
            self._lane.hold(mark)

    def run(self, moves: Tensor) -> None:
        """Do moves that no manager has numbered, and wait until they are done."""
        self._lane.follow()
        self._lane.run(moves)
        self._lane.finish()

    def landed(self) -> int:
        """The number of the newest move that is done together with all before it, 0 for none."""
        while self._marks and self._lane.passed(self._marks[0][1]):
            self._landed = self._marks.popleft()[0]
        return self._landed

    @staticmethod
    def _needed(moves: Tensor, count: int) -> int:
        """How many moves have to run before the pass: up to the `count`-th, and where that is any, all loads.

        Where numbers have gaps, a move's own is as large as its place says, or larger.
        """
        if count <= 0:
            return 0
        loads = moves[:, 0].nonzero()
        return max(min(count, len(moves)), int(loads[-1]) + 1 if len(loads) else 0)


def lane(
    pieces: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    num_blocks: int,
    arena: HostArena,
    device: torch.device,
) -> Lane:
    """The lane of a device.

    Args:
        pieces: (address in block 0, bytes to the next block, length) of those that make up a block, in order.
        sizes: bytes of a block that belong to each group, the first of it.
        num_blocks: blocks there are.
        arena: the slots.
        device: where the blocks lie.

    Raises:
        NotImplementedError: there is no way between host memory and this device: it is neither the CPU nor CUDA, or
            Triton is not installed.
        ValueError: a CUDA device, and an arena that is not pinned.
    """
    if device.type == "cpu":
        return CpuLane(pieces, sizes, num_blocks, arena)
    if device.type != "cuda":
        raise NotImplementedError(f"blocks are not moved between {device} and host memory; use CPU or CUDA")
    if not arena.pinned:
        raise ValueError(f"{arena} is not pinned, so {device} cannot reach it; leave pinned out, or set it")
    return CudaLane(pieces, sizes, arena, device)


class CpuLane:
    """Compiled copies, done when a call returns."""

    def __init__(
        self, pieces: Sequence[tuple[int, int, int]], sizes: Sequence[int], num_blocks: int, arena: HostArena
    ) -> None:
        self._pieces = torch.tensor(pieces, dtype=torch.int64)
        self._sizes = torch.tensor(sizes, dtype=torch.int64)
        self._num_blocks, self._arena = num_blocks, arena

    def follow(self) -> None: ...

    def run(self, moves: Tensor) -> None:
        move_blocks(
            self._pieces.data_ptr(),
            len(self._pieces),
            self._num_blocks,
            self._arena.address + HEADER_BYTES,
            self._arena.slot_bytes,
            self._arena.num_slots,
            self._sizes.data_ptr(),
            len(self._sizes),
            moves.data_ptr(),
            len(moves),
        )

    def mark(self) -> None: ...

    def hold(self, mark: None) -> None: ...

    def passed(self, mark: None) -> bool:
        return True

    def finish(self) -> None: ...


class CudaLane:
    """A stream of its own; one copy and one launch for each `run`."""

    def __init__(
        self,
        pieces: Sequence[tuple[int, int, int]],
        sizes: Sequence[int],
        arena: HostArena,
        device: torch.device,
    ) -> None:
        module = kernels("slots")
        if module is None:
            raise NotImplementedError(
                "on CUDA a Triton kernel moves blocks to the host, and Triton is not installed; `pip install triton`"
            )
        self._kernels, self._arena, self._device = module, arena, device
        self._chunks = module.Chunks.of(pieces, sizes, device)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.follow()  # what the tables and the blocks were filled with

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, moves: Tensor) -> None:
        # torch keeps pinned memory from others until the copies out of it are done, and the stream what it allocated.
        with torch.cuda.stream(self._stream):
            table = moves.pin_memory().to(self._device, non_blocking=True)
            self._kernels.move_blocks(self._chunks, self._arena.address + HEADER_BYTES, self._arena.slot_bytes, table)

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


def _finish(lane: Lane, arena: HostArena, memory: object) -> None:
    lane.finish()
