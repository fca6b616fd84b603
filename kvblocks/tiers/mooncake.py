"""MooncakeStore: objects in the memory that the machines of a fleet lend to a Mooncake Store.

Imports mooncake, an extra, only when a store is made.
"""

import ipaddress
import math
import socket
import time
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, SupportsIndex

import numpy as np

from kvblocks.sizes import checked_bytes
from kvblocks.tiers.calls import Calls
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats, checked_batch, checked_keys

__all__ = ["MooncakeStore"]

CONNECT_SECONDS = 5.0
SMALLEST_SEGMENT = 16 << 20
# Mooncake waits so long for a transfer and then gives up on it, while it may still be under way. What fails sooner has
# ended: its connection is closed.
GIVES_UP_SECONDS = 60.0
RETRY_SECONDS = 0.05
# Mooncake's error codes, as version 0.3.13 answers them.
NO_SPACE, BAD_ARGUMENT, LEASED = -200, -600, -706
# Not complete yet, not found, evicted while it was read, its copy is gone.
GONE = (-703, -704, -707, -710, -712)


class MooncakeStore(Store):
    """Objects in memory that the processes of a fleet lend to a Mooncake Store, found through its master.

    Args:
        master: `HOST:PORT` of `mooncake_master`.
        segment: bytes of this process's memory to lend for objects of all, as a number or as text such as "8GiB", 16
            MiB or more; 0 for none. What lies there is lost when this process ends.
        host: this machine's address, where the others fetch these objects; by default that of the interface towards
            the master. Mooncake refuses loopback addresses.
        protocol: "tcp", or "rdma" where there are such devices.
        devices: of RDMA, separated by commas; all by default.
        metadata: Mooncake's metadata server; by default its clients ask each other.
        lease: seconds that `delete` waits for an object that somebody looked up or read just now.

    Objects of registered memory travel without a copy in this process. With TCP any memory will do; RDMA needs
    `register`. What was seen of version 0.3.13, for which this is built:

    - A key that is there, or half written, is not stored again: the answer is OK, and the older object stays. What was
      left half written by a process that died can be stored anew after `put_start_discard_timeout_sec` (30) of the
      master.
    - Looking up and loading lease an object for `default_kv_lease_ttl` (10 s) of the master. Until then it is neither
      evicted nor deleted, so `delete` waits, and answers ERROR where `lease` was not long enough. What a batch has not
      read when its lease ends is MISSING, as it may be evicted while it is read.
    - While the process that lent the memory is dead or stopped, its objects are an ERROR, after 1 s to 30 s each call,
      until the master drops them (`client_ttl`, 10 s). A dead master is an ERROR after 4 s, a stopped one after 30 s;
      a master that was started again knows no objects. The calls of this class take as long; they hold no lock and not
      the GIL. Shorter limits are set before the process starts: MC_RPC_TIMEOUT_MS, MC_TCP_PROGRESS_TIMEOUT_SEC and
      MC_TCP_STATUS_TIMEOUT_SEC in the environment. Where Mooncake gave up after a minute the answer is TIMEOUT.
    - FULL is what an object is that finds no room now; the master then starts to evict.

    Each client listens on two ports of every interface, the master on one, without passwords or encryption. Whoever
    reaches them can read and write all objects: prompts, and what a model says. Keep them in a network of their own,
    and use `secret=` of the format of the objects, so that no other's objects verify and no key can be guessed.

    Raises:
        ModuleNotFoundError, ImportError: mooncake is not installed, or a library that it needs.
        ConnectionError: the master does not answer, or Mooncake's client cannot be set up.
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> with MooncakeStore("10.0.0.1:50051", segment="8GiB") as store:  # doctest: +SKIP
        ...     store.register(arena)
        ...     store.store(["a"], [arena[:4096]])
        [<Status.OK: 'ok'>]

    Thread-safety: any number of threads.
    """

    def __init__(
        self,
        master: str,
        *,
        segment: str | SupportsIndex,
        host: str | None = None,
        protocol: str = "tcp",
        devices: str = "",
        metadata: str = "P2PHANDSHAKE",
        lease: float = 15.0,
    ) -> None:
        self._calls = Calls(f"the store of the master {master}")
        nbytes = 0 if segment in (0, "0") else checked_bytes("segment", segment)
        if 0 < nbytes < SMALLEST_SEGMENT:
            raise ValueError(f"segment={segment!r} is {nbytes} bytes; Mooncake takes {SMALLEST_SEGMENT} or more, or 0")
        if isinstance(lease, bool) or not isinstance(lease, int | float) or not 0 <= lease < math.inf:
            raise ValueError(f"lease={lease!r} must be seconds, 0 or more")
        self._lease = float(lease)
        self._registered: dict[tuple[int, int], Buffer] = {}
        client = _client()
        setup = {
            "local_hostname": _own_address(master, host),
            "metadata_server": metadata,
            "global_segment_size": str(nbytes),
            "local_buffer_size": "0",
            "protocol": protocol,
            "rdma_devices": devices,
            "master_server_addr": master,
        }
        code = client.setup(setup)
        if code:
            raise ConnectionError(
                f"Mooncake's client cannot be set up: it answered {code} to {setup}; its log says why"
            )
        self._client = client

    def register(self, buffer: Buffer) -> None:
        """Announce memory in which buffers of later calls lie. It must outlive the store.

        Raises:
            ValueError: it overlaps memory that was registered before, or Mooncake refuses it.
        """
        view = memoryview(buffer).cast("B")
        place = _address(view), len(view)
        with self._calls.one():
            if place in self._registered:
                return
            code = self._client.register_buffer(*place)
            if code:
                raise ValueError(f"Mooncake does not register {len(view)} bytes at {place[0]:#x}: it answered {code}")
            self._registered[place] = view

    def lookup(self, keys: Sequence[str]) -> list[bool | None]:
        codes, failed = self._ask("batch_is_exist", checked_keys(keys))
        unknown = [code < 0 and code not in GONE for code in codes]
        for code in compress(codes, unknown):
            failed(code)
        return [None if failure else code == 1 for failure, code in zip(unknown, codes, strict=True)]

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=True)
        sizes = [len(view) for view in views]
        codes, failed = self._ask("batch_get_into", found, [_address(view) for view in views], sizes)

        def status(code: int, size: int) -> Status:
            if code == size:
                return Status.OK
            if code >= 0 or code == BAD_ARGUMENT:  # the latter where the buffer is shorter than the object
                return Status.CORRUPT
            return Status.MISSING if code in GONE else failed(code)

        return [status(code, size) for code, size in zip(codes, sizes, strict=True)]

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        """Keep a copy of each buffer; where there is an object of its key, that one stays, and OK is the answer too."""
        found, views = checked_batch(keys, buffers, writable=False)
        addresses, sizes = [_address(view) for view in views], [len(view) for view in views]
        codes, failed = self._ask("batch_put_from", found, addresses, sizes)
        return [Status.FULL if code == NO_SPACE else failed(code) if code else Status.OK for code in codes]

    def delete(self, keys: Sequence[str]) -> list[Status]:
        """Forget objects: OK, MISSING, or ERROR where one may still be there. Waits for leases, up to `lease` s."""
        found = checked_keys(keys)
        statuses = [Status.ERROR] * len(found)
        left, end = list(range(len(found))), time.monotonic() + self._lease
        while True:
            codes, failed = self._ask("batch_remove", [found[i] for i in left])
            leased = [i for i, code in zip(left, codes, strict=True) if code == LEASED]
            for i, code in zip(left, codes, strict=True):
                if code != LEASED:
                    statuses[i] = Status.OK if code == 0 else Status.MISSING if code == -704 else failed(code)
            left = leased
            if not left or time.monotonic() >= end:
                return statuses
            time.sleep(RETRY_SECONDS)

    def stats(self) -> StoreStats:
        """Every field is None: what the fleet holds, only the master knows; it has a metrics port."""
        with self._calls.one():
            return StoreStats(objects=None, bytes_used=None, capacity=None, evictions=None)

    def close(self) -> None:
        if self._calls.close():
            for address, _ in self._registered:
                self._client.unregister_buffer(address)
            self._client.close()
            self._registered.clear()

    def _ask(self, call: str, keys: list[str], *more: list[int]) -> tuple[list[int], Callable[[int], Status]]:
        """What Mooncake answers for each key, and what an error code then means."""
        columns: list[Sequence[Any]] = [keys, *more]
        codes = [-1] * len(keys)
        gave_up = False
        with self._calls.one():
            for share in _without_twins(keys):
                begun = time.monotonic()
                try:
                    answer = getattr(self._client, call)(*([each[i] for i in share] for each in columns))
                except RuntimeError as error:  # an exception of its own code
                    self._calls.complain(f"{call}: {error}")
                    continue
                gave_up |= time.monotonic() - begun >= GIVES_UP_SECONDS
                if len(answer) == len(share):
                    for i, code in zip(share, answer, strict=True):
                        codes[i] = code
        if all(code >= 0 for code in codes):
            self._calls.complain("")

        def failed(code: int) -> Status:
            self._calls.complain(f"{call} answered {code}")
            return Status.TIMEOUT if gave_up else Status.ERROR

        return codes, failed


def _without_twins(keys: Sequence[str]) -> list[list[int]]:
    """Places of the keys, in shares that have no key twice. Of two buffers for one key Mooncake fills one, and answers
    that it filled both."""
    shares: list[list[int]] = []
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        share = seen[key] = seen.get(key, -1) + 1
        if share == len(shares):
            shares.append([])
        shares[share].append(i)
    return shares


def _client() -> Any:
    try:
        from mooncake.store import MooncakeDistributedStore
    except ModuleNotFoundError:
        needs = 'MooncakeStore needs mooncake, which is not installed; run: pip install "kvblocks[mooncake]"'
        raise ModuleNotFoundError(needs, name="mooncake") from None
    except ImportError as error:
        raise ImportError(
            f"mooncake cannot be loaded: {error} (Debian: apt-get install libibverbs1 librdmacm1)"
        ) from None
    return MooncakeDistributedStore()


def _own_address(master: str, host: str | None) -> str:
    """The address of this machine for others. Tries the master first: Mooncake itself would do so for 90 seconds."""
    name, _, port = master.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"master={master!r:.100} is no HOST:PORT")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), CONNECT_SECONDS) as probe:
            towards = probe.getsockname()[0]
    except OSError as error:
        raise ConnectionError(f"the master {master} does not answer: {error}") from None
    address = towards if host is None else host
    try:
        loopback = ipaddress.ip_address(socket.gethostbyname(address) if host else address).is_loopback
    except OSError as error:
        raise ValueError(f"host={host!r:.100} is no address of this machine: {error}") from None
    if loopback:
        raise ValueError(
            f"{address} is a loopback address, which Mooncake refuses; give host=, the address of another interface"
        )
    return address


def _address(view: memoryview) -> int:
    """Where a buffer begins, also a read-only one."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)
