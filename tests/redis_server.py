"""A redis-server of a test's own, on a port of the loopback interface; and a server that answers what a test says."""

import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from stopping import stop_process

START_SECONDS = 20


def needs_redis_server() -> None:
    pytest.importorskip("redis", reason='needs redis; run: pip install "kvblocks[redis]"')
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt-get install redis-server)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A server that keeps nothing on disk, with its base options and those given; ended with the `with` block."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self.options = ["--unixsocket", str(self.socket), "--dir", str(folder), "--save", "", "--appendonly", "no"]
        self.options += ["--logfile", str(folder / "redis.log"), *options]
        self.log = folder / "redis.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, at the port that it had; waits until it answers."""
        listen = ["--bind", "127.0.0.1", "--port", str(self.port)] if "--tls-port" not in self.options else []
        self.process = subprocess.Popen(
            ["redis-server", *listen, *self.options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                log = self.log.read_text() if self.log.exists() else "nothing"
                pytest.fail(f"redis-server did not start within {START_SECONDS} s; it said: {log}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(1)
                asking.connect(str(self.socket))
                asking.sendall(b"PING\r\n")
                return bool(asking.recv(100))
        except OSError:
            return False

    def stop(self) -> None:
        """Until `go_on` it says nothing; the kernel still takes connections and bytes for it."""
        assert self.process is not None
        stop_process(self.process)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, also where it is stopped."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(START_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Answering:
    """A server that sends one text to each connection, after it has received something.

    Args:
        keep: whether a connection then stays open until the end, and says nothing more; it is closed otherwise.
    """

    def __init__(self, *answers: bytes, keep: bool = False) -> None:
        self.keep = keep
        self.kept: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answers = answers
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        for answer in self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.kept.append(connection)
            while True:  # what the client says of itself is not the request
                asked = connection.recv(1 << 16)
                if b"SETINFO" not in asked:
                    break
                connection.sendall(b"+OK\r\n")
            connection.sendall(answer)
            if not self.keep:
                connection.close()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.close()
        self.thread.join(20)
        for connection in self.kept:
            connection.close()
