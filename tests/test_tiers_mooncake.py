"""A `MooncakeStore`: what it makes of Mooncake's answers, then real ones in a network namespace of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mooncake_cluster import inside, why_not

from kvblocks.tiers import MooncakeStore, Status
from kvblocks.tiers import mooncake as mooncake_module

OK, MISSING, CORRUPT, TIMEOUT, FULL, ERROR = Status
SECONDS = 300


def test_with_real_masters_and_owners() -> None:
    """`tests/mooncake_cases.py`, in a process of its own: what is native there ends with it."""
    missing = why_not()
    if missing:
        pytest.skip(missing)
    cases = str(Path(__file__).with_name("mooncake_cases.py"))
    command = [sys.executable, "-m", "pytest", cases, "-q", "-p", "no:cacheprovider", "--durations=5"]
    settings = {"MC_RPC_TIMEOUT_MS": "1000", "MC_TCP_PROGRESS_TIMEOUT_SEC": "1", "MC_TCP_STATUS_TIMEOUT_SEC": "1"}
    settings |= {"MC_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        inside(command),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | settings,
        cwd=Path(cases).parent.parent,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-10_000:]}"


# --- what it makes of Mooncake's answers, told by a client of the tests


class Client:
    def __init__(self) -> None:
        self.answer: Any = [0]
        self.code = 0
        self.settings: dict[str, str] = {}

    def setup(self, settings: dict[str, str]) -> int:
        self.settings = settings
        return self.code

    def _call(self, keys: list[str], *more: list[int]) -> list[int]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return list(self.answer)

    batch_is_exist = batch_get_into = batch_put_from = batch_remove = _call

    def close(self) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that accepts connections, as a master does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    made = Client()
    monkeypatch.setattr(mooncake_module, "_client", lambda: made)
    monkeypatch.setattr(mooncake_module, "_own_address", lambda master, host: "10.77.0.1")
    return made


@pytest.mark.parametrize(
    ("code", "loaded", "stored", "found", "deleted"),
    [
        (0, CORRUPT, OK, False, OK),
        (1, CORRUPT, ERROR, True, ERROR),
        (4, OK, ERROR, False, ERROR),
        (8, CORRUPT, ERROR, False, ERROR),
        (-1, ERROR, ERROR, None, ERROR),
        (-200, ERROR, FULL, None, ERROR),
        (-600, CORRUPT, ERROR, None, ERROR),
        (-703, MISSING, ERROR, False, ERROR),
        (-704, MISSING, ERROR, False, MISSING),
        (-706, ERROR, ERROR, None, ERROR),
        (-707, MISSING, ERROR, False, ERROR),
        (-800, ERROR, ERROR, None, ERROR),
        (-900, ERROR, ERROR, None, ERROR),
        (-901, ERROR, ERROR, None, ERROR),
    ],
)
def test_every_answer(
    code: int, loaded: Status, stored: Status, found: bool | None, deleted: Status, client: Client
) -> None:
    with MooncakeStore("h:1", segment=0, lease=0) as store:
        client.answer = [code]
        assert store.load(["a"], [bytearray(4)]) == [loaded]
        assert store.store(["a"], [b"four"]) == [stored]
        assert store.lookup(["a"]) == [found]
        assert store.delete(["a"]) == [deleted]


@pytest.mark.parametrize("answer", [[], [0], [0, 0, 0], RuntimeError("of its own")])
def test_answers_that_are_none(answer: Any, client: Client) -> None:
    client.answer = answer
    with MooncakeStore("h:1", segment=0) as store:
        assert store.load(["a", "b"], [bytearray(4)] * 2) == [ERROR, ERROR]
        assert store.store(["a", "b"], [b"four"] * 2) == [ERROR, ERROR]
        assert store.lookup(["a", "b"]) == [None, None]
        assert store.delete(["a", "b"]) == [ERROR, ERROR]


def test_what_mooncake_gave_up_may_still_be_under_way(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_module, "GIVES_UP_SECONDS", 0.0)
    with MooncakeStore("h:1", segment=0) as store:
        client.answer = [-800, 4]
        assert store.load(["a", "b"], [bytearray(4), bytearray(4)]) == [TIMEOUT, OK]


def test_failures_are_logged_once(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with MooncakeStore("h:1", segment=0) as store:
        for answers in ([-900], [-900], [0], [-900]):
            client.answer = answers
            store.store(["a"], [b"four"])
    assert caplog.messages == ["the store of the master h:1 fails: batch_put_from answered -900"] * 2


def test_a_client_that_cannot_be_set_up(client: Client) -> None:
    client.code = -1
    with pytest.raises(ConnectionError, match="Mooncake's client cannot be set up: it answered -1"):
        MooncakeStore("h:1", segment="1GiB")
    assert client.settings["global_segment_size"] == str(1 << 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"master": "host"}, "master='host' is no HOST:PORT"),
        ({"master": "host:port"}, "is no HOST:PORT"),
        ({"master": ":1"}, "is no HOST:PORT"),
        ({"master": "h:99999"}, "is no HOST:PORT"),
        ({"segment": "much"}, "segment='much' is not a size"),
        ({"segment": -1}, "segment=-1 must be 1 to"),
        ({"segment": "15MiB"}, "segment='15MiB' is 15728640 bytes; Mooncake takes 16777216 or more, or 0"),
        ({"lease": -1}, "lease=-1 must be seconds, 0 or more"),
        ({"lease": "1"}, "lease='1' must be seconds"),
        ({"host": "127.0.0.1"}, "127.0.0.1 is a loopback address, which Mooncake refuses; give host="),
        ({}, "127.0.0.1 is a loopback address, which Mooncake refuses; give host="),
        ({"host": "no.such.host.invalid"}, "host='no.such.host.invalid' is no address"),
    ],
)
def test_wrong_arguments(
    arguments: Any, message: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_module, "_client", Client)
    port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=message):
        MooncakeStore(**({"master": f"127.0.0.1:{port}", "segment": 0} | arguments))


def test_a_master_that_is_not_there(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_module, "_client", Client)
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(ConnectionError, match=f"the master 127.0.0.1:{port} does not answer: .*refused"):
        MooncakeStore(f"127.0.0.1:{port}", segment=0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModuleNotFoundError('no', name='mooncake')", 'not installed; run: pip install "kvblocks[mooncake]"'),
        ("ImportError('libibverbs.so.1: cannot open')", "libibverbs.so.1: cannot open (Debian: apt-get install libib"),
    ],
)
def test_without_mooncake_it_says_what_to_install(error: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    (tmp_path / "mooncake" / "store.py").write_text(f"raise {error}")
    code = "from kvblocks.tiers import MooncakeStore; MooncakeStore('localhost:1', segment=0)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    assert message in done.stderr
