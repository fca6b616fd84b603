"""The command `kvblocks generate --store URL`, with servers that are there and servers that are not."""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer, needs_redis_server

from kvblocks.cli import stores as stores_module
from kvblocks.cli.main import main
from kvblocks.tiers import MemoryStore

REQUEST = ("generate", "--model", "tiny", "--max-new-tokens", "4", "--no-verify")


def reported(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What the command says in JSON."""
    assert main([*REQUEST, "--json", *more]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The error of a command that is wrong, as one line; nothing is printed besides."""
    assert main([*REQUEST, *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    return err.strip().splitlines()[-1]


def found_by_the_second(first: dict[str, Any], second: dict[str, Any], kind: str = "store") -> None:
    """Whether a second process took from a store of this kind what the first one had put there."""
    assert first[f"cached_tokens_{kind}"] == 0
    assert first[f"{kind}_bytes_stored"] > 0
    assert second[f"cached_tokens_{kind}"] > 400
    assert second[f"{kind}_bytes_loaded"] > 0
    assert second[f"{kind}_bytes_stored"] == 0
    tiers = ("device", "host", "disk", "store")
    assert sum(second[f"cached_tokens_{tier}"] for tier in tiers) == second["hit_tokens"]
    assert [entry["tokens"] for entry in first["completions"]] == [entry["tokens"] for entry in second["completions"]]


@pytest.fixture
def server(tmp_path: Path) -> Any:
    needs_redis_server()
    with RedisServer(tmp_path, "--requirepass", "hunter2") as started:
        yield started


def test_what_one_run_computes_the_next_one_finds(
    server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"redis://:hunter2@127.0.0.1:{server.port}/0"
    first, second = reported(capsys, "--store", url), reported(capsys, "--store", url)
    found_by_the_second(first, second)
    [entry] = second["stores"]
    assert (entry["name"], entry["kind"], entry["errors"]) == (f"redis://127.0.0.1:{server.port}/0", "store", 0)
    assert entry["bytes_loaded"] == second["store_bytes_loaded"]
    assert second["cached_tokens_disk"] == second["disk_bytes_loaded"] == 0
    # Under a secret everything has another name.
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    under = ("--store", url, "--secret-file", str(secret))
    found_by_the_second(reported(capsys, *under), reported(capsys, *under))
    # Both get everything, and what the folder has the server is not asked for.
    both = ("--store", f"{url[:-1]}1", "--cache-dir", str(tmp_path / "cache"))
    first, second = (reported(capsys, *both) for _ in range(2))
    found_by_the_second(first, second, "disk")
    assert first["store_bytes_stored"] == first["disk_bytes_stored"]
    assert second["cached_tokens_store"] == second["store_bytes_loaded"] == 0
    assert main([*REQUEST, *both]) == 0
    table = capsys.readouterr().out
    assert "of the disk" in table
    assert "of the store    0; 0 bytes read, 0 written" in table


def test_a_server_that_dies_after_the_start_is_a_cache_without_anything(
    server: RedisServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://:hunter2@127.0.0.1:{server.port}/0"
    first = reported(capsys, "--store", url)
    opened = stores_module._from_url

    def dies(url: str) -> Any:
        store = opened(url)
        server.kill()
        return store

    monkeypatch.setattr(stores_module, "_from_url", dies)
    assert main([*REQUEST, "--json", "--store", url]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [entry["tokens"] for entry in report["completions"]] == [entry["tokens"] for entry in first["completions"]]
    assert report["cached_tokens_store"] == report["store_bytes_stored"] == 0
    assert report["stores"][0]["errors"] > 0
    assert "not all blocks could be kept in redis://127.0.0.1" in err
    assert "hunter2" not in out + err


def test_a_folder_by_its_url_is_a_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/cache?size=64MiB"
    first, second = (reported(capsys, "--store", url) for _ in range(2))
    found_by_the_second(first, second, "disk")
    assert "cannot be used" in refused(capsys, "--store", url, "--store", url)


def test_a_prompt_that_is_longer_than_what_is_fetched_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said beforehand, with the memory that is enough."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a" * 400)
    asked = ("--json", "--prompts", str(prompts), "--kv-memory", "1MiB", "--cache-dir", str(tmp_path / "cache"))
    for _ in range(2):
        assert main([*REQUEST, *asked]) == 0
        out, err = capsys.readouterr()
        assert "the longest prompt takes 25 blocks, and stores bring 4 at most, a quarter of host memory" in err
    assert json.loads(out)["cached_tokens_disk"] == 4 * 16
    size = err.partition("--host-memory ")[2].split()[0]
    assert main([*REQUEST, *asked, "--host-memory", size]) == 0
    out, err = capsys.readouterr()
    assert "the longest prompt" not in err
    assert json.loads(out)["cached_tokens_disk"] == 25 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--store", "user:hunter2@host"],
            "--store cannot be used: 'user' is no kind of store; give a URL that begins",
        ),
        (["--store", ""], "'' is no kind of store"),
        (["--cache-dir", ""], "cannot be used: path is empty"),
        (["--store", "redis://u:hunter2@[h"], "--store cannot be used: "),
        (["--store", "redis://u:hunter2@h?size=1GiB"], "'redis://h' has an option 'size'"),
        (["--store", "mooncake://127.0.0.1:1"], "lacks the memory that this process lends"),
        (["--store", "file:///proc/none?size=1MiB"], "--store cannot be used: "),
        (["--secret-file", "/none"], "--secret-file is for what is kept in --cache-dir or a --store"),
        (["--store", "redis://h", "--secret-file", "/none"], "--secret-file /none cannot be read"),
        (
            ["--store", "redis://h", "--secret-file", "/dev/null"],
            "--secret-file /dev/null has 0 bytes; give at least 16",
        ),
    ],
)
def test_used_wrongly(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *arguments)
    assert error.startswith("kvblocks: error: ")
    assert message in error
    assert "hunter2" not in error


def test_servers_that_are_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before a model is read, and within seconds."""
    needs_redis_server()
    monkeypatch.setattr("kvblocks.cli.generate._load", None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        error = refused(capsys, "--store", f"redis://:hunter2@127.0.0.1:{port}/3")
        assert (
            f"--store redis://127.0.0.1:{port}/3 cannot be used: a first request failed as in the line above" in error
        )
    # It accepts, and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?timeout=0.2"
        assert "a first request failed" in refused(capsys, "--store", url)


def test_a_password_that_is_wrong(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a first request failed" in refused(capsys, "--store", f"redis://:wrong@127.0.0.1:{server.port}")


def test_stores_are_closed_unless_a_call_hangs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    class Counts(MemoryStore):
        def close(self) -> None:
            closed.append(threading.current_thread())
            super().close()

    monkeypatch.setattr(stores_module, "open_store", lambda url: Counts("64MiB"))
    found = reported(capsys, "--store", "memory://")
    assert found["store_bytes_stored"] > 0
    assert len(closed) == 1
    refused(capsys, "--store", "memory://", "--prompts", "/none")
    assert len(closed) == 2
    monkeypatch.setattr("kvblocks.integrations.transformers.Pool.close", lambda self: False)
    reported(capsys, "--store", "memory://")
    assert len(closed) == 2
