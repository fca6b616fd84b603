"""The stores that `kvblocks generate` is given: opened before a model is read, and what came from which kind of them.

Imports the stores, which need no torch.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from kvblocks.cli.extras import read_secret
from kvblocks.errors import StoreInUse, UsageError
from kvblocks.tiers import DiskStore, Store, open_store
from kvblocks.tiers.objects import MIN_SECRET_BYTES

__all__ = ["CommandStores", "opened_stores"]

_CACHE_SIZE = 10 << 30  # bytes of a folder of cached blocks, where nobody says


class CommandStores:
    """Stores in the order in which they are asked: the folder of `--cache-dir`, then each `--store`.

    Attributes:
        stores: all of them.
        names: how reports call each; without passwords.
        kinds: of each: "disk" of this machine, or "store".
        secret: for what they keep, or None.
        hang: whether a call of one has not returned, so that none can be closed.
    """

    def __init__(self, secret: bytes | None) -> None:
        self.secret = secret
        self.stores: list[Store] = []
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.hang = False

    def add(self, store: Store, name: str) -> None:
        self.stores.append(store)
        self.names.append(name)
        self.kinds.append("disk" if isinstance(store, DiskStore) else "store")

    def by_kind(self, numbers: Sequence[int]) -> dict[str, int]:
        """Sums of one number for each store, or of none for any."""
        sums = {"disk": 0, "store": 0}
        for kind, number in zip(self.kinds, numbers, strict=False):
            sums[kind] += number
        return sums


@contextmanager
def opened_stores(args: argparse.Namespace) -> Iterator[CommandStores]:
    """The stores of a command line, closed at the end.

    Raises:
        UsageError: a folder or a URL that cannot be used, or a server that does not answer.
    """
    if args.cache_size is not None and args.cache_dir is None:
        raise UsageError("--cache-size is of the files in --cache-dir; give that too")
    if args.secret_file is not None and args.cache_dir is None and not args.store:
        raise UsageError("--secret-file is for what is kept in --cache-dir or a --store; give one of them")
    secret = read_secret(args.secret_file)
    if secret is not None and len(secret) < MIN_SECRET_BYTES:
        raise UsageError(
            f"--secret-file {args.secret_file} has {len(secret)} bytes; give at least {MIN_SECRET_BYTES}, of a random "
            "source"
        )
    opened = CommandStores(secret)
    with ExitStack() as closing:
        if args.cache_dir is not None:
            opened.add(closing.enter_context(_folder(args)), args.cache_dir)
        for url in args.store:
            opened.add(closing.enter_context(_from_url(url)), _without_secrets(url))
        try:
            yield opened
        finally:
            if opened.hang:
                closing.pop_all()


def _folder(args: argparse.Namespace) -> Store:
    try:
        return DiskStore(args.cache_dir, _CACHE_SIZE if args.cache_size is None else args.cache_size)
    except (StoreInUse, OSError, ValueError) as error:
        raise UsageError(f"--cache-dir {args.cache_dir} cannot be used: {error}") from None


def _from_url(url: str) -> Store:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # else Mooncake tells of all that it does
    try:
        store = open_store(url)
    except (StoreInUse, OSError, ValueError, ImportError) as error:
        raise UsageError(f"--store cannot be used: {error}") from None
    # A wrong address shows now; from here on a server that fails is a cache that has nothing.
    if store.lookup(["is anybody there?"]) == [None]:
        store.close()
        raise UsageError(f"--store {_without_secrets(url)} cannot be used: a first request failed as in the line above")
    return store


def _without_secrets(url: str) -> str:
    """A URL that names a store, without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
