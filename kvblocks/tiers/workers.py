"""Workers: the threads on which stores are called, some for each store, so that one that hangs holds up no other.

Whoever queues a job takes no lock that a thread may hold while it waits for the interpreter. Knows neither stores nor
blocks. Imports only the standard library.
"""

import logging
import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TypeAlias

__all__ = ["Job", "Task", "Workers"]

_log = logging.getLogger("kvblocks")

# Work in parts. Each value that it yields is the number of the lane on whose threads the next part runs.
Job: TypeAlias = Iterator[int]


class Task:
    """Jobs that belong together, and how far they are.

    A task that was given up starts no further part of a job. It is at rest once no part runs: from then on nobody
    touches what its jobs work on.

    Thread-safety: any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0  # jobs that have not ended
        self._running = 0  # parts that run now
        self._given_up = False

    @property
    def ended(self) -> bool:
        """Whether all jobs have run to their end."""
        return not self._left

    @property
    def at_rest(self) -> bool:
        """Whether no part of a job runs, nor will."""
        # Without the lock: once it is given up no part starts, and a job has ended when its last part has.
        return (self._given_up or not self._left) and not self._running

    def give_up(self) -> None:
        """Start no further part; those that run are let run."""
        with self._lock:
            self._given_up = True

    def expect(self, jobs: int) -> None:
        """Say that so many jobs of this task are about to be queued."""
        with self._lock:
            self._left += jobs

    def run(self, job: Job) -> int | None:
        """Run the next part of a job; returns the lane of the one after it, None where there is none."""
        with self._lock:
            if self._given_up:
                return None
            self._running += 1
        lane = None
        try:
            lane = next(job, None)
        except BaseException:
            _log.exception("work in the background failed")
        finally:
            with self._lock:
                self._left -= lane is None
                self._running -= 1
        return lane


class Workers:
    """Threads in lanes: jobs go from lane to lane, each part of them on a thread of one lane.

    Args:
        threads: of each lane. All are started at once, as a start waits for the thread; they do not keep the process
            from ending.

    Raises:
        RuntimeError: the system has no threads to spare.

    Thread-safety: any thread.
    """

    def __init__(self, threads: Iterable[int]) -> None:
        self._progress = threading.Condition()
        self._counts = tuple(threads)
        self._queues: list[SimpleQueue[tuple[Task, Job] | None]] = [SimpleQueue() for _ in self._counts]
        self._closed = False
        try:
            for number, count in enumerate(self._counts):
                for _ in range(count):
                    name = f"kvblocks-tiers-{number}"
                    threading.Thread(target=self._work, args=(number,), name=name, daemon=True).start()
        except RuntimeError:
            self.close()
            raise

    def start(self, task: Task, jobs: list[tuple[int, Job]]) -> None:
        """Queue jobs of a task, each for its first lane. None of them runs where the workers are closed."""
        task.expect(len(jobs))
        for lane, job in jobs:
            self._queues[lane].put((task, job))

    def wait(self, seconds: float) -> None:
        """Wait until a part of a job has ended, or so long."""
        with self._progress:
            self._progress.wait(seconds)

    def close(self) -> None:
        """Let threads end when what they run now is done. Queued jobs are dropped, and their tasks do not end."""
        self._closed = True
        for queue, count in zip(self._queues, self._counts, strict=True):
            for _ in range(count):
                queue.put(None)

    def _work(self, lane: int) -> None:
        while (found := self._queues[lane].get()) is not None and not self._closed:
            task, job = found
            following = task.run(job)
            if following is not None:
                self._queues[following].put((task, job))
            del found, task, job  # an idle thread keeps nothing alive
            with self._progress:
                self._progress.notify_all()
