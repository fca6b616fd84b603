"""A `RedisStore`: the suite, then whatever happens to servers and connections, with a redis-server of the tests."""

import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from redis_server import Answering, RedisServer, needs_redis_server
from server_drill import drill

from kvblocks.tiers import RedisStore, Status, Store
from kvblocks.tiers import redis as redis_module
from kvblocks.tiers.conformance import CHECKS, Subject

pytest.importorskip("redis", reason='needs redis; run: pip install "kvblocks[redis]"')

OK, MISSING, CORRUPT, TIMEOUT, FULL, ERROR = Status
TIMEOUT_SECONDS, SLACK = 0.3, 3.0  # SLACK: what a busy machine may take besides
LARGE = 8 << 20  # more than sockets buffer


@cache
def content(seed: object, nbytes: int = 50_000) -> bytes:
    return random.Random(repr(seed)).randbytes(nbytes)


def put(store: Store, *keys: str, nbytes: int = 50_000) -> list[Status]:
    return store.store(keys, [content(key, nbytes) for key in keys])


def get(store: Store, *keys: str, nbytes: int = 50_000) -> list[Status]:
    """What loading answers; what is there must be right."""
    targets = [bytearray(nbytes) for _ in keys]
    statuses = store.load(keys, targets)
    for key, status, target in zip(keys, statuses, targets, strict=True):
        assert status is not OK or target == content(key, nbytes), f"other bytes than were stored as {key}"
    return statuses


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    needs_redis_server()
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """A server that runs, is empty and has no limit."""
    configure(shared, "maxmemory", "0")
    ask(shared, "FLUSHALL")
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may kill."""
    needs_redis_server()
    with RedisServer(tmp_path) as server:
        yield server


def ask(server: RedisServer, *words: str) -> Any:
    import redis

    with redis.Redis(unix_socket_path=str(server.socket), socket_timeout=20) as client:
        return client.execute_command(*words)


def configure(server: RedisServer, name: str, value: str) -> None:
    ask(server, "CONFIG", "SET", name, value)


@pytest.mark.parametrize(("policy", "by"), [("noeviction", "port"), ("allkeys-lru", "socket")])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check: Callable[[Subject], None], policy: str, by: str, server: RedisServer) -> None:
    configure(server, "maxmemory-policy", policy)
    configure(server, "maxmemory", "6mb")
    url = server.url if by == "port" else f"unix://{server.socket}?db=0"
    check(Subject(open=lambda: RedisStore(url), capacity=6 << 20))


# --- what happens to servers


def test_a_server_that_is_killed_and_started_again(own: RedisServer) -> None:
    """While threads store and load: misses and errors, never another's bytes; afterwards the same store goes on."""
    keys, seen = [f"k{i}" for i in range(6)], []
    with RedisStore(own.url, timeout=5) as store:
        assert put(store, *keys) == [OK] * 6
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                put(store, *keys)
                seen.extend(get(store, *keys))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        own.kill()
        assert store.lookup(["k0"]) == [None]
        assert get(store, "k0") == [ERROR]
        assert put(store, "k0") == [ERROR]
        assert store.delete(["k0"]) == [ERROR]
        assert store.stats().objects is None
        own.start()
        time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert set(seen) <= {OK, MISSING, ERROR}
        assert put(store, *keys) == [OK] * 6
        assert get(store, *keys) == [OK] * 6


def test_connections_that_the_server_has_closed_are_made_anew(server: RedisServer) -> None:
    with RedisStore(server.url) as store:
        assert put(store, "a") == [OK]
        ask(server, "CLIENT", "KILL", "TYPE", "normal")
        assert get(store, "a") == [OK]


def test_a_server_that_is_stopped(own: RedisServer) -> None:
    """By SIGSTOP. Late replies are nobody's."""
    keys = [f"k{i}" for i in range(3)]
    with RedisStore(own.url, timeout=TIMEOUT_SECONDS, connect_timeout=TIMEOUT_SECONDS) as store:
        assert put(store, *keys) == [OK] * 3
        own.stop()
        calls: list[tuple[Callable[[], object], object]] = [
            (lambda: get(store, *keys), [TIMEOUT] * 3),
            (lambda: get(store, *keys), [TIMEOUT] * 3),  # on a connection that is new
            (lambda: put(store, "new"), [TIMEOUT]),
            (lambda: put(store, "large", nbytes=LARGE), [TIMEOUT]),
            (lambda: store.lookup(keys), [None] * 3),
            (lambda: store.delete(["k0", "k1"]), [TIMEOUT] * 2),
        ]
        for call, wanted in calls:
            before = time.monotonic()
            assert call() == wanted
            assert time.monotonic() - before < TIMEOUT_SECONDS + SLACK
        own.go_on()
        assert set(get(store, *keys)) <= {OK, MISSING}  # the delete may have been done
        assert put(store, *keys) == [OK] * 3
        for _ in range(3):
            assert get(store, *reversed(keys)) == [OK] * 3


def test_a_server_that_stops_in_the_middle_of_a_batch(own: RedisServer) -> None:
    keys = [f"k{i}" for i in range(6)]
    with RedisStore(own.url, timeout=TIMEOUT_SECONDS) as store:
        assert [put(store, key, nbytes=LARGE) for key in keys] == [[OK]] * 6
        answers = []
        for _ in range(3):
            timer = threading.Timer(0.005, own.stop)
            timer.start()
            before = time.monotonic()
            answers += get(store, *keys, nbytes=LARGE)
            assert time.monotonic() - before < TIMEOUT_SECONDS + SLACK
            timer.join()
            own.go_on()
        assert TIMEOUT in answers
        assert set(answers) <= {OK, TIMEOUT}
        assert get(store, *keys, nbytes=LARGE) == [OK] * 6


def test_a_server_that_is_full(server: RedisServer) -> None:
    """It refuses, and keeps what it has; what goes makes room."""
    configure(server, "maxmemory-policy", "noeviction")
    with RedisStore(server.url) as store:
        assert put(store, *(f"k{i}" for i in range(20))) == [OK] * 20
        configure(server, "maxmemory", "1mb")
        assert put(store, "new", "k0") == [FULL, FULL]
        assert put(store, *["large"] * 20, nbytes=LARGE) == [FULL] * 20
        assert get(store, "k0", "k19", "new") == [OK, OK, MISSING]
        assert store.stats().capacity == 1 << 20
        assert store.delete([f"k{i}" for i in range(20)]) == [OK] * 20
        configure(server, "maxmemory", "64mb")
        assert put(store, "new") == [OK]


def test_objects_that_are_evicted_while_they_are_read(server: RedisServer) -> None:
    configure(server, "maxmemory-policy", "allkeys-lru")
    configure(server, "maxmemory", "3mb")
    keys, seen = [f"k{i}" for i in range(8)], []
    with RedisStore(server.url) as store:
        stop = threading.Event()

        def crowd() -> None:
            for i in range(2000):
                if stop.is_set():
                    break
                put(store, f"other{i}", nbytes=200_000)

        thread = threading.Thread(target=crowd)
        thread.start()
        for _ in range(60):
            put(store, *keys)
            seen += get(store, *keys) + get(store, *keys)
        stop.set()
        thread.join(30)
        assert set(seen) == {OK, MISSING}


def test_who_dies_in_the_middle_of_a_put_has_stored_nothing(server: RedisServer) -> None:
    with RedisStore(server.url) as store:
        assert put(store, "old") == [OK]
        for key in ("old", "new"):
            with socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(b"*3\r\n$3\r\nSET\r\n$3\r\n%s\r\n$50000\r\n" % key.encode() + b"x" * 20_000)
                time.sleep(0.05)
                assert get(store, "old", "new") == [OK, MISSING]
        assert get(store, "old", "new") == [OK, MISSING]


def test_what_is_no_object(server: RedisServer) -> None:
    with RedisStore(server.url) as store:
        ask(server, "RPUSH", "list", "a")
        assert store.lookup(["list"]) == [True]
        assert put(store, "a", "b") == [OK, OK]
        assert get(store, "a", "list", "b") == [OK, CORRUPT, OK]
        assert store.load(["a", "b"], [bytearray(3), bytearray(50_000)]) == [CORRUPT, OK]
        assert put(store, "list") == [OK]
        assert get(store, "list") == [OK]


def test_batches_that_are_more_than_is_sent_ahead(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"k{i}" for i in range(300)]
    with RedisStore(server.url) as store:
        for ahead in (1, 120_000, redis_module.AHEAD_BYTES):
            monkeypatch.setattr(redis_module, "AHEAD_BYTES", ahead)
            ask(server, "FLUSHALL")
            assert put(store, *keys[:200]) == [OK] * 200
            assert get(store, *keys) == [OK] * 200 + [MISSING] * 100
            assert store.lookup(keys) == [True] * 200 + [False] * 100
            assert store.delete(keys) == [OK] * 200 + [MISSING] * 100
        many = [f"m{i}" for i in range(3 * redis_module.LOOKUP_KEYS + 1)]
        store.store(many[-1:] + many[:1], [b"x", b"x"])
        found = store.lookup(many)
        assert found[0]
        assert found[-1]
        assert found.count(True) == 2


def test_payloads_are_not_copied_in_this_process(server: RedisServer) -> None:
    source, target = content("large", LARGE), bytearray(LARGE)
    with RedisStore(server.url) as store:
        store.lookup(["large"])
        tracemalloc.start()
        try:
            assert store.store(["large"], [source]) == [OK]
            assert store.load(["large"], [target]) == [OK]
            assert tracemalloc.get_traced_memory()[1] < LARGE / 20
        finally:
            tracemalloc.stop()
    assert target == source


def test_breakers_of_a_server_that_is_stopped_for_longer_than_a_deadline(own: RedisServer) -> None:
    with RedisStore(own.url, timeout=1) as store:
        drill(store, own.stop, own.go_on, 1.0, hangs=True, loses=False)


def test_breakers_of_a_server_that_is_killed_and_started_again(own: RedisServer) -> None:
    with RedisStore(own.url, timeout=1) as store:
        drill(store, own.kill, own.start, 1.0, hangs=False, loses=True)


# --- what comes on a connection


GET = b"$4\r\nfour\r\n"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (GET, OK),
        (b"$-1\r\n", MISSING),
        (b"$5\r\nfours\r\n", CORRUPT),
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", FULL),
        (b"-LOADING Redis is loading the dataset in memory\r\n", ERROR),
        (b"-ERR max number of clients reached\r\n", ERROR),
        (b"", ERROR),
        (b"$4\r\n", ERROR),
        (b"$4\r\nfo", ERROR),
        (b"$4\r\nfour", ERROR),
        (b"$4\r\nfour!!", ERROR),
        (b"$four\r\nfour\r\n", ERROR),
        (b"$\r\n", ERROR),
        (b"+four\r\n", ERROR),
        (b":4\r\n", ERROR),
        (b":4four\r\n", ERROR),
        (b"*1\r\n$4\r\nfour\r\n", ERROR),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ERROR),
        (b"\r\n", ERROR),
        (b"+" + b"x" * 10_000, ERROR),
        (b"-\xff\r\n", ERROR),
    ],
)
def test_whatever_a_server_answers(answer: bytes, status: Status) -> None:
    target = bytearray(4)
    with Answering(answer) as server, RedisStore(server.url, timeout=TIMEOUT_SECONDS) as store:
        assert store.load(["a"], [target]) == [status]
    assert status is not OK or target == b"four"


def test_what_comes_after_the_reply_is_not_the_next_one() -> None:
    target = bytearray(4)
    with (
        Answering(GET + b"$4\r\nevil\r\n", GET, keep=True) as server,
        RedisStore(server.url, timeout=TIMEOUT_SECONDS) as store,
    ):
        for _ in range(2):
            assert store.load(["a"], [target]) == [OK]
            assert target == b"four"


def test_a_connection_that_timed_out_is_not_used_again() -> None:
    target = bytearray(4)
    with (
        Answering(b"$4\r\nfo", GET, keep=True) as server,
        RedisStore(server.url, timeout=TIMEOUT_SECONDS) as store,
    ):
        assert store.load(["a", "b"], [bytearray(4), bytearray(4)]) == [TIMEOUT, TIMEOUT]
        assert store.load(["a"], [target]) == [OK]
        assert target == b"four"


def test_after_full_nothing_more_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_module, "AHEAD_BYTES", 1)
    full = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    with Answering(full, keep=True) as server, RedisStore(server.url, timeout=TIMEOUT_SECONDS) as store:
        assert put(store, "a", "b", "c") == [FULL] * 3  # no reply to the second would ever come


def test_an_interrupt_leaves_no_reply_for_the_next_call(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvblocks.tiers.resp import Replies

    with RedisStore(server.url) as store:
        assert put(store, "a", "b") == [OK, OK]
        with monkeypatch.context() as interrupted:

            def interrupt(replies: Replies, view: memoryview) -> None:
                raise KeyboardInterrupt

            interrupted.setattr(Replies, "fill", interrupt)
            with pytest.raises(KeyboardInterrupt):
                get(store, "a", "b")
        assert get(store, "b", "a") == [OK, OK]


# --- who may use it


def test_passwords_and_what_is_logged(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """An error is logged once, until it was another one or none; a password never."""
    ask(server, "ACL", "SETUSER", "kv", "on", ">p@ss", "~*", "+@all")
    url = f"redis://kv:{{}}@127.0.0.1:{server.port}/3"
    caplog.set_level(logging.WARNING, "kvblocks")
    with RedisStore(url.format("wr0ng")) as store:
        assert [put(store, "a"), put(store, "a"), get(store, "a")] == [[ERROR]] * 3
        with pytest.raises(ValueError, match="2 keys and 1 buffers"):
            store.load(["a", "b"], [bytearray(1)])
    [record] = caplog.records
    assert f"the store in redis://127.0.0.1:{server.port}/3 fails" in record.getMessage()
    assert "WRONGPASS" in record.getMessage() or "invalid username-password" in record.getMessage()
    with RedisStore(url.format("p%40ss")) as store:
        assert put(store, "a") == [OK]
        ask(server, "ACL", "SETUSER", "kv", "-@all", "+set")
        assert get(store, "a") == [ERROR]
        assert put(store, "a") == [OK]
        assert get(store, "a") == [ERROR]
    assert len(caplog.records) == 3
    assert not any("p@ss" in text or "p%40ss" in text or "wr0ng" in text for text in caplog.messages)
    with RedisStore(server.url) as store:
        assert store.lookup(["a"]) == [False]  # it lies in another database


def test_tls(tmp_path: Path) -> None:
    needs_redis_server()
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    made = subprocess.run([*make, "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True, timeout=60)
    assert made.returncode == 0, made.stderr
    server = RedisServer(tmp_path)
    server.options += ["--port", "0", "--tls-port", str(server.port), "--bind", "127.0.0.1", "--tls-auth-clients", "no"]
    server.options += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    url = f"rediss://127.0.0.1:{server.port}/0"
    with server, RedisStore(f"{url}?ssl_ca_certs={certificate}") as store:
        assert put(store, "a", "b") == [OK, OK]
        assert get(store, "b", "none", "a") == [OK, MISSING, OK]
        with RedisStore(url) as untrusting:  # a certificate that nobody vouches for
            assert get(untrusting, "a") == [ERROR]


def test_a_fork_has_no_part_in_it(server: RedisServer) -> None:
    code = f"""if True:
        import os, sys
        from kvblocks.tiers import RedisStore
        store = RedisStore({server.url!r})
        store.store(["a"], [b"four"])
        if os.fork() == 0:
            try:
                store.lookup(["a"])
            except ValueError as error:
                print(error, flush=True)
            store.close()
            os._exit(0)
        os.wait()
        print(store.lookup(["a"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "of which this one is a fork" in done.stdout, done.stderr
    assert "[True]" in done.stdout


def test_close_waits_for_calls_that_run(own: RedisServer) -> None:
    store = RedisStore(own.url, timeout=20)
    assert put(store, "a") == [OK]
    own.stop()
    answers: list[Status] = []
    loading = threading.Thread(target=lambda: answers.extend(get(store, "a")))
    loading.start()
    time.sleep(0.1)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    own.go_on()
    closing.join(20)
    loading.join(20)
    assert answers == [OK]
    with pytest.raises(ValueError, match=f"the store in redis://127.0.0.1:{own.port}/0 is closed"):
        store.lookup(["a"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h", "'http://h' is no Redis URL; give redis://HOST:PORT/DB"),
        ("redis://:7", "names no host"),
        ("redis://" + "x" * 100, "names no host"),
        ("redis://h:port", "port"),
        ("redis://h:70000", "port"),
        ("redis://u:secret@h/main", "'redis://h/main': the database 'main' is no number"),
        ("unix://", "names no socket"),
        ("unix:///s?db=x", "the database 'x' is no number"),
        ("redis://h?socket_timeout=5", "has an option 'socket_timeout'"),
        ("rediss://h?ssl_nonsense=5", "redis does not take the options"),
    ],
)
def test_urls_that_say_nothing(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as raised:
        RedisStore(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("seconds", [0, -1, 1_000_001, 1e308, float("inf"), float("nan"), "5", None, True])
def test_timeouts_that_cannot_be(seconds: Any) -> None:
    for name in ("timeout", "connect_timeout"):
        with pytest.raises(ValueError, match=f"{name}=.* must be seconds, more than 0"):
            RedisStore("redis://localhost", **{name: seconds})


def test_without_redis_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "redis.py").write_text("raise ModuleNotFoundError(\"No module named 'redis'\", name='redis')")
    code = "from kvblocks.tiers import RedisStore; RedisStore('redis://localhost')"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    assert 'RedisStore needs redis, which is not installed; run: pip install "kvblocks[redis]"' in done.stderr
