"""A device's two streams, of passes and of moves, that do their work late. Knows no manager and no memory."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(eq=False)
class Work:
    """Something that a stream will do: not before what it waits for is done."""

    do: Callable[[], None]
    after: Sequence["Work"]
    first_move: int = 0  # the numbers of the moves that it makes
    last_move: int = 0
    done: bool = False

    @property
    def ready(self) -> bool:
        return all(work.done for work in self.after)


class Streams:
    """What was launched and is not done yet.

    Each stream keeps its order; between them anything goes that events allow.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.passes: deque[Work] = deque()
        self.moves: deque[Work] = deque()
        self.landed = 0  # moves up to here are done

    @property
    def idle(self) -> bool:
        return not self.passes and not self.moves

    def launch_pass(self, do: Callable[[], None], needs: int) -> Work:
        """A pass that waits for the moves up to a number, as far as they are on their way."""
        late = [work for work in self.moves if work.first_move <= needs]
        work = Work(do, late[-1:])
        self.passes.append(work)
        return work

    def launch_move(self, do: Callable[[], None], after: Sequence[Work], first: int, last: int) -> None:
        self.moves.append(Work(do, after, first, last))

    def advance(self) -> None:
        """One of the streams does its next piece of work."""
        ready = [stream for stream in (self.passes, self.moves) if stream and stream[0].ready]
        assert ready, "the streams wait for each other"
        stream = self.rng.choice(ready)
        work = stream[0]
        work.do()
        work.done = True
        stream.popleft()
        self.landed = max(self.landed, work.last_move)

    def run_some(self) -> None:
        """Time passes: sometimes all of it."""
        left = self.rng.choice([0, 0, 1, 2, 5, len(self.passes) + len(self.moves)])
        while left and not self.idle:
            self.advance()
            left -= 1

    def finish(self) -> None:
        while not self.idle:
            self.advance()
