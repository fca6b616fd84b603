"""RedisStore: objects in a Redis server that many processes share.

How replies are read is in `kvblocks.tiers.resp`. Imports redis, an extra, only when a store is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

from kvblocks.tiers.calls import Calls
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats, checked_batch, checked_keys

__all__ = ["RedisStore"]

AHEAD_BYTES = 16 << 20  # of payload that a batch may have on its way: enough for the network, little for the server
REQUEST_BYTES = 512  # that a request and its reply take beside the payload
LONGEST_SECONDS = 1_000_000  # of a timeout: not every number is one that sockets take
LOOKUP_KEYS = 1024  # of one script: the server does nothing else while it runs
LOOKUP = (
    b"local found = {} for i, key in ipairs(KEYS) do found[i] = redis.call('EXISTS', key) end "
    b"return table.concat(found)"
)


class RedisStore(Store):
    """Objects in a Redis server, each under its own key; many processes and machines may share it.

    Args:
        url: `redis://HOST:PORT/DB`, `rediss://HOST:PORT/DB` (TLS) or `unix:///PATH?db=DB`, also with `USER:PASSWORD@`
            before the host. `?ssl_ca_certs=FILE` and the other `ssl_` options of redis are handed to it.
        timeout: seconds that the server may take to accept the payload of an object, or to answer the next bytes. A
            call gives up after that.
        connect_timeout: seconds that connecting to an address may take. Finding a host's address is not limited.

    The constructor does not connect. A server that cannot be reached, refuses the password or is still loading is an
    ERROR of the objects concerned, and is logged once. Each call takes a connection from a pool, or makes one, and a
    connection on which anything went wrong is closed, so that no late reply is taken for another: when the server is
    there again, the next call finds it. After TIMEOUT too the buffer is not touched any more, but a SET that was sent
    may still take effect.

    Payloads go from the caller's buffer to the socket without a copy in this process, and from the socket into the
    caller's buffer without one, except for at most 4 KiB of each that arrive together with the line before them. (With
    TLS the ssl module copies both once.) Requests of a batch are sent ahead of the replies. Looking up is one EVAL
    for 1,024 keys; it keeps nothing alive. The server needs GET, SET, UNLINK, EVAL, EXISTS, DBSIZE and INFO.

    The database should hold nothing else: `stats` counts all its keys. How much it keeps, and what goes first, is the
    server's own setting: with `maxmemory` and `maxmemory-policy allkeys-lru` it evicts; with `noeviction` it refuses,
    which is FULL here. Redis keeps objects of up to 512 MiB. Clusters are not supported.

    Who can read the server, or the network without TLS, sees prompts (headers hold tokens, and K and V say as much);
    who can write to it decides what a model says. Give it a password or an ACL and bind it to a network of its own,
    and use `secret=` of the format of the objects, so that no other's objects verify and no key can be guessed.

    Raises:
        ModuleNotFoundError: redis is not installed.
        ValueError: `url` is not as above, or a timeout is not a positive number.

    Example:
        >>> with RedisStore("redis://10.0.0.5:6379/0", timeout=2) as store:  # doctest: +SKIP
        ...     store.store(["a"], [b"four"])
        [<Status.OK: 'ok'>]

    Thread-safety: any number of threads; each call uses a connection of its own.
    """

    writes_late: ClassVar[bool] = False

    def __init__(self, url: str, *, timeout: float = 5.0, connect_timeout: float = 1.0) -> None:
        try:
            import redis.connection
            import redis.exceptions
        except ModuleNotFoundError:
            needs = 'RedisStore needs redis, which is not installed; run: pip install "kvblocks[redis]"'
            raise ModuleNotFoundError(needs, name="redis") from None
        from kvblocks.tiers.resp import Payload, Replies

        self._Payload = Payload
        self._errors = redis.exceptions
        name = _checked_url(url)
        self._calls = Calls(f"the store in {name}")
        options: dict[str, Any] = {
            "parser_class": Replies,
            "protocol": 2,
            "socket_timeout": _seconds("timeout", timeout),
            "socket_connect_timeout": _seconds("connect_timeout", connect_timeout),
            "max_connections": 2**31 - 1,
        }
        try:
            self._pool: Any = redis.ConnectionPool.from_url(url, **options)
            # An option that redis does not know shows here, and not in a thread later.
            self._pool.connection_class(**self._pool.connection_kwargs)
        except (TypeError, ValueError, redis.exceptions.RedisError) as error:
            raise ValueError(f"redis does not take the options of {name}: {error}") from None

    def lookup(self, keys: Sequence[str]) -> list[bool | None]:
        found = [key.encode() for key in checked_keys(keys)]
        shares = [found[i : i + LOOKUP_KEYS] for i in range(0, len(found), LOOKUP_KEYS)]
        answers = [bytearray(len(share)) for share in shares]

        def read(i: int, reply: Any) -> Status:
            if not isinstance(reply, self._Payload):
                return self._failed(reply)
            if reply.length != len(answers[i]):
                reply.skip()
                return Status.ERROR
            reply.into(memoryview(answers[i]))
            return Status.OK

        requests = [(_command(b"EVAL", LOOKUP, b"%d" % len(share), *share), None, 0) for share in shares]
        statuses = self._batch(requests, read)
        return [
            flag == ord("1") if status is Status.OK else None
            for status, answer in zip(statuses, answers, strict=True)
            for flag in answer
        ]

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=True)

        def read(i: int, reply: Any) -> Status:
            if reply is None:
                return Status.MISSING
            if not isinstance(reply, self._Payload):
                return self._failed(reply)
            if reply.length != len(views[i]):
                reply.skip()
                return Status.CORRUPT
            reply.into(views[i])
            return Status.OK

        requests = [(_command(b"GET", key.encode()), None, len(view)) for key, view in zip(found, views, strict=True)]
        return self._batch(requests, read)

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=False)
        requests = [
            (b"*3\r\n$3\r\nSET\r\n%s$%d\r\n" % (_argument(key.encode()), len(view)), view, len(view))
            for key, view in zip(found, views, strict=True)
        ]
        return self._batch(requests, lambda i, reply: Status.OK if reply == "OK" else self._failed(reply))

    def delete(self, keys: Sequence[str]) -> list[Status]:
        """Forget objects: OK, MISSING, or TIMEOUT or ERROR where the object may still be there, or go later."""

        def read(i: int, reply: Any) -> Status:
            if not isinstance(reply, int):
                return self._failed(reply)
            return Status.OK if reply else Status.MISSING

        return self._batch([(_command(b"UNLINK", key.encode()), None, 0) for key in checked_keys(keys)], read)

    def stats(self) -> StoreStats:
        """`objects` are the database's keys, `capacity` is the server's `maxmemory`; None where nothing answers."""
        size: int | None = None
        info: dict[str, str] = {}

        def read(i: int, reply: Any) -> Status:
            nonlocal size
            if isinstance(reply, int):
                size = reply
            elif isinstance(reply, self._Payload):
                text = memoryview(bytearray(reply.length))
                reply.into(text)
                lines = (line.partition(":") for line in bytes(text).decode().splitlines())
                info.update((name, value) for name, _, value in lines)
            else:
                return self._failed(reply)
            return Status.OK

        self._batch([(_command(b"DBSIZE"), None, 0), (_command(b"INFO", b"memory"), None, 0)], read)
        return StoreStats(objects=size, bytes_used=None, capacity=int(info.get("maxmemory", 0)) or None, evictions=None)

    def close(self) -> None:
        if self._calls.close():
            self._pool.disconnect()

    def _batch(
        self, requests: Sequence[tuple[bytes, memoryview | None, int]], read: Callable[[int, Any], Status]
    ) -> list[Status]:
        """What `read` makes of the reply to each request: its bytes, a payload to send behind them, and the length of
        the payload in either direction. After a failure of the connection the rest has that failure, and after FULL
        what was not sent yet is FULL too."""
        statuses: list[Status] = []
        rest, count = Status.ERROR, len(requests)
        with self._calls.one():
            try:
                if count:
                    with self._connection() as connection:
                        sent = ahead = 0
                        for i in range(count):
                            first, full = sent, statuses[-1:] == [Status.FULL]
                            most = AHEAD_BYTES if ahead <= AHEAD_BYTES // 2 else 0  # so that many go in one piece
                            while sent < count and not full and (sent == i or ahead < most):
                                ahead += requests[sent][2] + REQUEST_BYTES
                                sent += 1
                            if first < sent:
                                connection.send_packed_command(_pieces(requests[first:sent]))
                            elif i == sent:
                                rest = Status.FULL
                                break
                            try:
                                reply = connection.read_response(disable_decoding=True)
                            except self._errors.ResponseError as error:
                                reply = error
                            statuses.append(read(i, reply))
                            ahead -= requests[i][2] + REQUEST_BYTES
                if Status.ERROR not in statuses:
                    self._calls.complain("")
            except (self._errors.TimeoutError, TimeoutError) as error:
                rest = Status.TIMEOUT
                self._calls.complain(error)
            except (self._errors.RedisError, OSError) as error:
                self._calls.complain(error)
        return statuses + [rest] * (count - len(statuses))

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection without replies that nobody has read; closed after any error on it."""
        connection = self._pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _failed(self, reply: object) -> Status:
        """The status that an error of the server, or a reply that nothing here asked for, stands for."""
        text = str(reply)
        if text.startswith("OOM "):
            return Status.FULL
        if text.startswith("WRONGTYPE "):  # something else than an object is under the key
            return Status.CORRUPT
        self._calls.complain(text)
        return Status.ERROR


def _pieces(requests: Sequence[tuple[bytes, memoryview | None, int]]) -> list[bytes | memoryview]:
    """What to send, in as few pieces as there can be without copying a payload."""
    pieces: list[bytes | memoryview] = []
    head: list[bytes] = []
    for command, payload, _ in requests:
        head.append(command)
        if payload is not None:
            pieces += [b"".join(head), payload]
            head = [b"\r\n"]
    return [*pieces, b"".join(head)]


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n%s" % (len(words), b"".join(map(_argument, words)))


def _argument(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _checked_url(url: str) -> str:
    """What to call the server in messages, without the password."""
    shape = "give redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH?db=DB"
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError as error:
        raise ValueError(f"the port of a Redis URL: {error}; {shape}") from None
    name = f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"{name!r:.100} is no Redis URL; {shape}")
    if parts.scheme == "unix" and not parts.path.strip("/"):
        raise ValueError(f"{name!r:.100} names no socket; {shape}")
    if parts.scheme != "unix":
        try:
            (parts.hostname or ".").encode("idna")  # as looking it up does
        except UnicodeError:
            raise ValueError(f"{name!r:.100} names no host; {shape}") from None
    if parts.scheme != "unix" and parts.path not in ("", "/") and not parts.path[1:].isdecimal():
        raise ValueError(f"{name!r:.100}: the database {parts.path[1:]!r} is no number; {shape}")
    for option, value in parse_qsl(parts.query, keep_blank_values=True):
        if option == "db" and not value.isdecimal():
            raise ValueError(f"{name!r:.100}: the database {value!r} is no number; {shape}")
        if option != "db" and not option.startswith("ssl_"):
            raise ValueError(f"{name!r:.100} has an option {option!r}; db and those that begin with ssl_ are known")
    return name


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value <= LONGEST_SECONDS):
        raise ValueError(f"{name}={value!r} must be seconds, more than 0 and at most {LONGEST_SECONDS:,}")
    return float(value)
