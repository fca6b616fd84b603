"""Models on the hub, served from loopback: revisions, what is downloaded, and how soon it is said that there is none.

Each plan runs in a process of its own, because huggingface_hub reads its settings when it is imported.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvblocks.models.hub import PATIENCE, HubModel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}
PER_TOKEN = 4 * 2 * (16 + 16) * 2


def safetensors(sizes: dict[str, int], padding: int = 0) -> bytes:
    """A file whose tensors have these sizes, with a long name in the metadata to make the header longer."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "padding": "x" * padding}}
    start = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(start)


class Hub:
    """A hub with one model: `files[revision][name]` is what a file holds. `sent` counts the bytes of each answer."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.sent: list[tuple[str, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                _, _, rest = self.path.partition("/some-org/some.model_1/resolve/")
                revision, _, name = rest.partition("/")
                content = hub.files.get(revision, {}).get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if revision in hub.files else "RevisionNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                status, asked = 200, self.headers.get("Range") or ""
                whole = len(content)
                if asked:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    status, content = 206, content[int(first) : int(last or whole) + 1]
                self.send_response(status)
                self.send_header("X-Repo-Commit", f"{sorted(hub.files).index(revision):040x}")
                self.send_header("ETag", f'"{revision}-{name}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)
                    hub.sent.append((name, len(content)))

            def log_message(self, *_: Any) -> None:
                """Nothing: the test's own output is enough."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def run(
    url: str, home: Path, *arguments: str, offline: bool = False, patience: str | None = "60"
) -> tuple[int, Any, str]:
    """The command's status, what it printed and what it complained of; a busy machine's hub may answer late."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment.pop("HF_HUB_ETAG_TIMEOUT", None)
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    if patience is not None:
        environment["HF_HUB_ETAG_TIMEOUT"] = patience
    command = [sys.executable, "-m", "kvblocks", "plan", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def test_only_the_config_is_asked_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files["main"] = {"config.json": json.dumps(LLAMA).encode()}
    hub.files["v2"] = {"config.json": json.dumps(LLAMA | {"num_key_value_heads": 4}).encode()}
    code, found, _ = run(hub.url, tmp_path, "some-org/some.model_1")
    assert (code, found["bytes_per_token"], found["model"]) == (0, PER_TOKEN, "some-org/some.model_1")
    code, found, _ = run(hub.url, tmp_path, "some-org/some.model_1@v2")
    assert (code, found["bytes_per_token"], found["model"]) == (0, 2 * PER_TOKEN, "some-org/some.model_1@v2")
    assert {name for name, _ in hub.sent} == {"config.json"}
    code, _, said = run(hub.url, tmp_path, "some-org/some.model_1@v3")
    assert (code, said.count("\n")) == (2, 1)
    assert "some-org/some.model_1@v3 is neither a folder nor a file, and config.json is not to be had" in said
    code, found, _ = run(hub.url, tmp_path, "some-org/some.model_1", offline=True)
    assert (code, found["bytes_per_token"]) == (0, PER_TOKEN)


def test_without_a_network_one_sentence(hub: Hub, tmp_path: Path) -> None:
    closed = Hub()
    closed.server.server_close()
    for offline, reason in ((False, "127.0.0.1 cannot be reached"), (True, "HF_HUB_OFFLINE is set")):
        code, _, said = run(closed.url, tmp_path, "some-org/some.model_1", offline=offline)
        assert (code, said.count("\n")) == (2, 1)
        assert reason in said


def test_a_name_that_is_never_resolved_is_waited_for_no_longer_than_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver of a machine without a network may hang, and no limit of a library bounds it."""
    pytest.importorskip("huggingface_hub")
    asked, answer = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        asked.set()
        answer.wait(20)
        raise OSError("too late")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", hang)
    monkeypatch.setattr("kvblocks.models.hub.PATIENCE", 0.2)
    for name in [name for name in os.environ if "proxy" in name.lower() or name == "HF_HUB_ETAG_TIMEOUT"]:
        monkeypatch.delenv(name)
    assert PATIENCE <= 1  # which leaves one of two seconds for what is imported
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"some-org/some.model_1 .* does not answer within 0\.2 s"):
        HubModel("some-org/some.model_1", "some-org/some.model_1", None).file("config.json")
    assert time.monotonic() - start < 10
    assert asked.wait(20)
    answer.set()


def test_a_hub_that_sends_a_byte_a_second_does_not_answer(tmp_path: Path) -> None:
    """Libraries bound the wait for each byte, which here is never long, and not the sum."""
    pytest.importorskip("huggingface_hub")
    done = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}":
                connection.sendall(bytes([byte]))
                if done.wait(1):
                    return

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=trickle, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        code, _, said = run(url, tmp_path, "some-org/some.model_1", patience=None)
        assert time.monotonic() - start < 20  # the answer is 42 bytes long
        done.set()
    assert (code, said.count("\n")) == (2, 1)
    assert "127.0.0.1 does not answer within 1 s (HF_HUB_ETAG_TIMEOUT sets how long to wait)" in said


def test_weights_take_a_header_over_the_network(hub: Hub, tmp_path: Path) -> None:
    weights = safetensors({"model.embed_tokens.weight": 3_000_000, "model.layers.4.mtp.weight": 500_000}, 150_000)
    quantized = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    hub.files["main"] = {"config.json": json.dumps(quantized).encode(), "model.safetensors": weights}
    code, found, _ = run(hub.url, tmp_path, "some-org/some.model_1", "--weights", "auto", "--memory", "1GiB")
    assert (code, found["weights_bytes"]) == (0, 3_500_000)
    assert any("500,000 B of them are of layers for multi-token prediction" in note for note in found["notes"])
    assert sum(sent for _, sent in hub.sent) < 300_000


def test_weights_by_the_index_alone(hub: Hub, tmp_path: Path) -> None:
    shards = {f"model-{i}.safetensors": safetensors({f"model.layers.{i}.weight": 1000 + i}) for i in range(3)}
    index: dict[str, Any] = {"weight_map": {f"model.layers.{i}.weight": name for i, name in enumerate(shards)}}
    files = {"config.json": json.dumps(LLAMA).encode(), **shards}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": 3003}, **index}).encode()
    hub.files["main"] = files
    hub.files["old"] = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    for revision, asked in (("main", set()), ("old", set(shards))):
        hub.sent.clear()
        _, found, _ = run(
            hub.url, tmp_path, f"some-org/some.model_1@{revision}", "--weights", "auto", "--memory", "1GiB"
        )
        assert found["weights_bytes"] == 3003
        assert {name for name, _ in hub.sent} >= asked
        assert bool({name for name, _ in hub.sent} & set(shards)) == bool(asked)
