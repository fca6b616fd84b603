"""The replies of a Redis server, with payloads read from the socket into the memory that they are for.

A parser for the connections of redis (their `parser_class`). Its own parsers copy a payload four times on the way, into
and out of a buffer of theirs. RESP2 without arrays: what `RedisStore` asks for has none. Imports redis, an extra.
"""

import ssl
from typing import Any

from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import InvalidResponse, ResponseError

__all__ = ["Payload", "Replies"]

BUFFER_BYTES = 4096  # of a payload, at most so many bytes are copied: those that came with the line before it
LONGEST_LINE = 2048


class Payload:
    """A bulk reply whose bytes are still to be read. Until then its connection gives no other reply."""

    def __init__(self, replies: "Replies", length: int) -> None:
        self.length = length
        self._replies = replies

    def into(self, view: memoryview) -> None:
        """Read it into `view`, which has `length` bytes."""
        self._replies.fill(view)
        self._replies.end_payload()

    def skip(self) -> None:
        scratch, left = memoryview(bytearray(min(self.length, 1 << 16))), self.length
        while left:
            part = scratch[:left]
            self._replies.fill(part)
            left -= len(part)
        self._replies.end_payload()


class Replies:
    """What comes from one connection. The name and the meaning of its methods are those of redis' own parsers.

    Args:
        socket_read_size: what redis' own parsers read at once; not used here.
    """

    def __init__(self, socket_read_size: int = 0) -> None:
        self._sock: Any = None
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = self._end = 0  # of what has been received and not been read
        self._in_payload = False

    def on_connect(self, connection: Any) -> None:
        self._sock = connection._sock
        self._start = self._end = 0
        self._in_payload = False

    def on_disconnect(self) -> None:
        self._sock = None

    def can_read(self, timeout: float = 0) -> bool:
        """Whether something has come, within so many seconds.

        Raises:
            redis.exceptions.ConnectionError: the server has closed the connection.
        """
        if self._start < self._end:
            return True
        before = self._sock.gettimeout()
        self._sock.settimeout(timeout)
        try:
            self._receive()
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            return False
        finally:
            self._sock.settimeout(before)
        return True

    def read_response(self, disable_decoding: bool = False, **unused: object) -> Any:
        """A text, an int, None, a `Payload`, or the ResponseError that the server answered, which is not raised."""
        if self._in_payload:
            raise InvalidResponse("a reply was asked for before the payload of the one before it was read")
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind in (b"$", b":") and not rest.removeprefix(b"-").isdigit():
            raise InvalidResponse(f"the server answered {line!r:.60} where a number should be")
        if kind == b"$":
            length = int(rest)
            if length < 0:
                return None
            self._in_payload = True
            return Payload(self, length)
        if kind == b"+":
            return rest.decode(errors="replace")
        if kind == b":":
            return int(rest)
        if kind == b"-":
            return ResponseError(rest.decode(errors="replace"))
        raise InvalidResponse(f"the server answered {line!r:.60}, which is no reply of RESP2 to what was asked")

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as `view` has."""
        have = min(self._end - self._start, len(view))
        view[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(view):
            received = self._sock.recv_into(view[have:])
            if not received:
                raise Disconnected("the server closed the connection in the middle of a reply")
            have += received

    def end_payload(self) -> None:
        end = bytearray(2)
        self.fill(memoryview(end))
        if end != b"\r\n":
            raise InvalidResponse(f"the server ended a payload with {bytes(end)!r}")
        self._in_payload = False

    def _line(self) -> bytes:
        while (found := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > LONGEST_LINE:
                raise InvalidResponse(f"the server answered a line of more than {LONGEST_LINE} bytes")
            self._receive()
        line = bytes(self._buffer[self._start : found])
        self._start = found + 2
        return line

    def _receive(self) -> None:
        """Receive more behind what is there."""
        left = self._end - self._start
        self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left
        received = self._sock.recv_into(memoryview(self._buffer)[left:])
        if not received:
            raise Disconnected("the server closed the connection")
        self._end += received
