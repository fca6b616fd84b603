"""Which calls of a store run, so that `close` can wait for them, and what fails. Imports only the standard library."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

__all__ = ["Calls"]

_log = logging.getLogger("kvblocks")


class Calls:
    """The calls of one store, which belongs to the process that opened it.

    Args:
        name: of the store, for errors and the log.

    Thread-safety: any number of threads.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._running = 0
        self._complaint = ""
        self._closed = False
        self._pid = os.getpid()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """One call, which `close` waits for.

        Raises:
            ValueError: the store is closed, or this process is a fork of the one that opened it.
        """
        if os.getpid() != self._pid:
            raise ValueError(
                f"{self.name} belongs to process {self._pid}, of which this one is a fork; open another here"
            )
        with self._changed:
            if self._closed:
                raise ValueError(f"{self.name} is closed")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Refuse further calls and wait for those that run. False where there is nothing to do: the store was closed,
        or belongs to another process."""
        if os.getpid() != self._pid:
            return False
        with self._changed:
            closes, self._closed = not self._closed, True
            while self._running:
                self._changed.wait()
        return closes

    def complain(self, error: object) -> None:
        """Log what fails, once until something else does, or nothing: then `error` is ""."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            if self._complaint:
                _log.warning("%s fails: %s", self.name, error)
