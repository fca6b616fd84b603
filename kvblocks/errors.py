"""What kvblocks raises beyond Python's own errors. Imports nothing, so that compiled code can raise these."""

__all__ = [
    "InvariantViolation",
    "KVBlocksError",
    "MissingField",
    "MovesPending",
    "NoFreeBlocks",
    "NoFreeStates",
    "NotConforming",
    "OutOfMemory",
    "StaleSequence",
    "StoreInUse",
    "TooManySequences",
    "UnknownModel",
    "UnsupportedModel",
    "UsageError",
]


class KVBlocksError(Exception):
    """The base of all errors below.

    Each has one of Python's own as a second base, by which it can be caught too; `UsageError`, which the commands catch
    themselves, has none.
    """


class OutOfMemory(KVBlocksError, MemoryError):
    """A cache did not fit; nothing stays allocated.

    Attributes:
        requested: bytes asked for.
        free: bytes that were available.
        blocks_that_fit: blocks of the same shape that would have fitted into `free`.
    """

    def __init__(self, message: str, requested: int, free: int, blocks_that_fit: int) -> None:
        super().__init__(message, requested, free, blocks_that_fit)
        self.requested = requested
        self.free = free
        self.blocks_that_fit = blocks_that_fit

    def __str__(self) -> str:
        return str(self.args[0])


class NoFreeBlocks(KVBlocksError, RuntimeError):
    """The pool cannot serve a call now; nothing changed. Free or preempt sequences, then call again.

    Attributes:
        needed: blocks the whole call needed.
        free: blocks it could have had, always fewer than `needed`: what a watermark keeps free is left out.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message, needed, free)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return str(self.args[0])


class NoFreeStates(KVBlocksError, RuntimeError):
    """A step needs more slots for states than can be had; nothing changed. Free or preempt sequences, then call again.

    Attributes:
        needed: slots that the whole step needed.
        free: slots that it could have had, always fewer than `needed`.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message, needed, free)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return str(self.args[0])


class MovesPending(KVBlocksError, RuntimeError):
    """Blocks that a step has to copy first were not copied; nothing changed. Call `engine.move(step)` after `prepare`.

    Attributes:
        needs: number of the newest move that is waited for.
    """

    def __init__(self, message: str, needs: int) -> None:
        super().__init__(message, needs)
        self.needs = needs

    def __str__(self) -> str:
        return str(self.args[0])


class StaleSequence(KVBlocksError, LookupError):
    """A handle whose sequence or pin is gone, or that never was one.

    Attributes:
        handle: the handle as given.
    """

    def __init__(self, message: str, handle: int) -> None:
        super().__init__(message, handle)
        self.handle = handle

    def __str__(self) -> str:
        return str(self.args[0])


class NotConforming(KVBlocksError, AssertionError):
    """A store does something else than the interface of stores says."""


class StoreInUse(KVBlocksError, RuntimeError):
    """Another store, of this process or another one, has a folder of blocks open; nothing of it was touched.

    Attributes:
        path: the folder.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class TooManySequences(KVBlocksError, RuntimeError):
    """All `max_seqs` places of a manager are taken by sequences and pins.

    Attributes:
        max_seqs: the manager's limit.
    """

    def __init__(self, message: str, max_seqs: int) -> None:
        super().__init__(message, max_seqs)
        self.max_seqs = max_seqs

    def __str__(self) -> str:
        return str(self.args[0])


class InvariantViolation(KVBlocksError, RuntimeError):
    """`audit()` found the manager's state broken: a bug in kvblocks, never the caller's.

    Attributes:
        invariant: number of the first broken invariant, 1 to 12, of those in ARCHITECTURE.md.
    """

    def __init__(self, message: str, invariant: int) -> None:
        super().__init__(message, invariant)
        self.invariant = invariant

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownModel(KVBlocksError, ValueError):
    """An architecture, or a field of its config, that the planner cannot turn into bytes; the message names it."""


class MissingField(UnknownModel):
    """A field that a config does not have and that decides how large the cache is.

    Attributes:
        name: the field's.
    """

    def __init__(self, model_type: str, name: str) -> None:
        super().__init__(f"config of model_type={model_type!r} has no {name}, which decides how large its cache is")
        self.name = name


class UnsupportedModel(KVBlocksError, ValueError):
    """A model that cannot be served from the paged cache; the message says why."""


class UsageError(KVBlocksError):
    """What was asked for cannot be done; the message is one sentence for the person who asked. Exit code 2."""
