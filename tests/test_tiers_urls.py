"""Stores from URLs."""

import os
from pathlib import Path
from typing import Any

import pytest

from kvblocks.tiers import DiskStore, MemoryStore, RedisStore, Status, open_store, urls
from kvblocks.tiers import mooncake as mooncake_module


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    with open_store(f"file://{tmp_path}/with%20space?size=1MiB&threads=2") as store:
        assert isinstance(store, DiskStore)
        assert store.stats().capacity == 1 << 20
        assert store.store(["a"], [b"four"]) == [Status.OK]
    assert (folder / "1.index").exists()
    with open_store(f"FILE://localhost{tmp_path}/with%20space?size=1MiB") as store:
        assert store.lookup(["a"]) == [True]


def test_a_server() -> None:
    pytest.importorskip("redis", reason='needs redis; run: pip install "kvblocks[redis]"')
    for url in (
        "redis://u:p@localhost:1/2?timeout=0.5",
        "rediss://h?ssl_ca_certs=/f&connect_timeout=2",
        "unix:///s?db=1",
    ):
        with open_store(url) as store:
            assert isinstance(store, RedisStore)
    with open_store("unix:///no/such/socket?timeout=0.5") as store:
        assert store.load(["a"], [bytearray(1)]) == [Status.ERROR]


def test_a_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def store(*master: str, **settings: Any) -> MemoryStore:
        made.append({"master": master, **settings})
        return MemoryStore(1)

    monkeypatch.setattr(urls, "MooncakeStore", store)
    open_store("mooncake://h:1?segment=8GiB&host=10.0.0.2&protocol=rdma&devices=a,b&metadata=etcd://m&lease=2")
    open_store("mooncake://h:1?segment=0")
    texts = {"host": "10.0.0.2", "protocol": "rdma", "devices": "a,b", "metadata": "etcd://m"}
    assert made == [
        {"master": ("h:1",), "segment": "8GiB", **texts, "lease": 2.0},
        {"master": ("h:1",), "segment": "0"},
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "'' is no kind of store; give a URL that begins with file://, redis://,"),
        ("/var/cache/kv", "is no kind of store"),
        ("file:/var/cache/kv", "'file' is no kind of store"),
        ("s3://bucket/secret", "'s3' is no kind of store"),
        ("file://cache/kv?size=1MiB", "names no folder; give file:///PATH"),
        ("file:///?size=1MiB", "names no folder"),
        ("file:///kv", "lacks the bytes that the folder may take; add"),
        ("file:///kv?size=much", "capacity='much' is not a size"),
        ("file:///kv?size=", "capacity='' is not a size"),
        ("file:///kv?size=1MiB&threads=many", "threads='many' in the URL of a store is no number"),
        ("file:///kv?size=1MiB&speed=1", "has an option 'speed'; size and threads are known"),
        ("redis://u:secret@h?timeout=soon", "timeout='soon' in the URL of a store is no number"),
        ("redis://u:secret@h?timeout=0", "timeout=0.0 must be seconds, more than 0"),
        ("redis://u:secret@h?size=1GiB", "'redis://h' has an option 'size'"),
        ("mooncake://h:1", "lacks the memory that this process lends; add ?segment=8GiB"),
        ("mooncake://h?segment=0", "master='h' is no HOST:PORT"),
        ("mooncake://h:1/name?segment=0", "a URL of Mooncake has a host and a port alone"),
        ("mooncake://u:secret@h:1?segment=0", "a URL of Mooncake has a host and a port alone"),
        ("mooncake://h:1?segment=0&size=1", "has an option 'size'; segment, host,"),
        ("mooncake://h:1?segment=0&lease=x", "lease='x' in the URL of a store is no number"),
        ("redis://u:secret@h?timeout=", "timeout='' in the URL of a store is no number"),
    ],
)
def test_urls_that_name_no_store(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url == "mooncake://h?segment=0":
        monkeypatch.setattr(mooncake_module, "_client", object)
    if url.startswith("redis"):
        pytest.importorskip("redis", reason='needs redis; run: pip install "kvblocks[redis]"')
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the message is compared below
        open_store(url)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)
    assert not os.path.exists("/kv")
