"""`kvblocks cache ls`, `verify` and `rm`, as a person or a script meets them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvblocks.cli import main as cli
from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers import DiskStore, ObjectFormat
from kvblocks.tiers.objects import namespace

NAME = namespace(
    model="m", weights_version="1", dtype="float32", codec="none", block_size=16, layers=[], groups=[], layout="NHD"
)
SECRET = b"sixteen bytes ok"


def fill(folder: Path, secret: bytes | None = None, count: int = 3) -> list[str]:
    """Two groups of blocks, and their keys."""
    form = ObjectFormat(NAME, secret=secret)
    blocks = form.blocks(form.root(), np.arange(count * 16), 16)
    with DiskStore(folder, 1 << 20) as store:
        keys: list[str] = []
        for group, nbytes in ((0, 500), (1, 6000)):
            for block in blocks:
                made = bytearray(HEADER_BYTES) + bytes([len(keys) + 1]) * nbytes
                form.seal(block, group, "all", made)
                keys.append(form.key(block, group, "all"))
                store.store(keys[-1:], [made])
    return keys


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert cli.main(["cache", arguments[0], "--json", *arguments[1:]]) == code
    return json.loads(capsys.readouterr().out)


def spoil(folder: Path, nbytes: int = 1) -> None:
    """Change the first bytes of the payload of the first object of group 1."""
    with open(folder / "2.slots", "r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\xff" * nbytes)


def test_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kv"
    keys = fill(folder)
    with DiskStore(folder, 1 << 20) as store:  # it may be in use
        store.store(["something else\x1b[2J"], [b"x"])
        found = run(capsys, "ls", str(folder))
    assert (found["objects"], found["bytes"]) == (7, 3 * (HEADER_BYTES + 500) + 3 * (HEADER_BYTES + 6000) + 1)
    kinds = [(kind["namespace"], kind["group"], kind["shard"], kind["objects"]) for kind in found["kinds"]]
    assert kinds == [(NAME, 0, "all", 3), (NAME, 1, "all", 3), (None, None, None, 1)]
    assert keys[0].split("/")[1] == NAME
    assert cli.main(["cache", "ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: 7 objects, {found['bytes']:,} bytes"
    assert re.fullmatch(rf"{NAME[:12]}… +1 +all +3 +30,288 +\d{{4}}-\d\d-\d\d \d\d:\d\d", lines[3])
    assert lines[4].startswith("(no blocks)")


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kv"
    keys = fill(folder)
    assert run(capsys, "verify", str(folder)) == {
        "folder": str(folder),
        "objects": 6,
        "bytes": 3 * (HEADER_BYTES + 500) + 3 * (HEADER_BYTES + 6000),
        "damaged": [],
        "damaged_files": 0,
        "removed": 0,
    }
    spoil(folder)
    fault = "a header or a payload that its checksum does not fit"
    found = run(capsys, "verify", str(folder), code=1)
    assert found["damaged"] == [{"key": keys[3], "fault": fault}]
    assert cli.main(["cache", "verify", "--remove", str(folder)]) == 1
    assert capsys.readouterr().out == f"{keys[3]}: {fault}\n6 objects, 1 damaged and deleted\n"
    assert run(capsys, "verify", str(folder))["objects"] == 5


def test_verify_finds_objects_under_other_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kv"
    keys = fill(folder)
    with DiskStore(folder, 1 << 20) as store:
        made = bytearray(HEADER_BYTES + 500)
        store.load(keys[:1], [made])
        store.store([keys[1], "line\nbreak"], [made, b"x"])
    found = run(capsys, "verify", str(folder), code=1)
    assert {entry["key"]: entry["fault"] for entry in found["damaged"]} == {
        keys[1]: f"it is {keys[0]}",
        "line\nbreak": "no header of kvblocks",
    }
    assert cli.main(["cache", "verify", str(folder)]) == 1
    assert "line\\nbreak: no header of kvblocks\n" in capsys.readouterr().out


def test_verify_with_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "kv", tmp_path / "secret"
    fill(folder, SECRET)
    file.write_bytes(SECRET)
    assert run(capsys, "verify", str(folder), "--secret-file", str(file))["damaged"] == []
    found = run(capsys, "verify", str(folder), code=1)
    assert [entry["fault"] for entry in found["damaged"]] == ["made with a secret"] * 6
    file.write_bytes(b"short")
    assert (
        error(capsys, "verify", str(folder), "--secret-file", str(file)) == "secret has 5 bytes; give at least 16, "
        "from a random source"
    )
    file.unlink()
    assert error(capsys, "verify", str(folder), "--secret-file", str(file)) == (
        f"--secret-file {file} cannot be read: No such file or directory"
    )


def test_verify_says_when_files_were_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kv"
    fill(folder)
    (folder / "1.index").write_bytes(b"no table")
    assert cli.main(["cache", "verify", str(folder)]) == 1
    assert capsys.readouterr().out == "1 files of it could not be read, and are deleted\n3 objects, 0 damaged\n"
    assert run(capsys, "verify", str(folder))["damaged_files"] == 0


def test_rm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kv"
    fill(folder)
    (folder / "mine").touch()
    found = run(capsys, "rm", str(folder))
    assert found["freed_bytes"] > 6 * HEADER_BYTES
    assert found["folder_removed"] is False
    assert [file.name for file in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()
    fill(folder)
    assert cli.main(["cache", "rm", str(folder)]) == 0
    assert re.fullmatch(r"[\d,]+ bytes are free\n", capsys.readouterr().out)
    assert not folder.exists()


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that goes with exit code 2."""
    assert cli.main(["cache", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvblocks: error: ")
    return captured.err.removeprefix("kvblocks: error: ").rstrip("\n")


@pytest.mark.parametrize("action", ["ls", "verify", "rm"])
def test_a_folder_that_is_none_of_a_store_stays_as_it_is(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.index").touch()
    message = f"{tmp_path} is no folder of a DiskStore: there is no kvblocks.lock in it"
    assert error(capsys, action, str(tmp_path)) == message
    assert [file.name for file in tmp_path.iterdir()] == ["1.index"]
    assert "is no folder of a DiskStore" in error(capsys, action, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("action", ["verify", "rm"])
def test_a_folder_in_use(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        store.store(["a"], [b"x"])
        assert "is in use by process" in error(capsys, action, str(tmp_path))
        assert store.lookup(["a"]) == [True]
