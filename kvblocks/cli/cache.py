"""The commands `kvblocks cache ls`, `verify` and `rm` for the folder of a `DiskStore`.

Imports the store only when a command runs.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblocks.cli.extras import read_secret
from kvblocks.errors import UsageError

if TYPE_CHECKING:
    from kvblocks.tiers.disk import StoredObject

__all__ = ["add_cache_parser"]

SHOWN = 20  # damaged objects that are listed in text


def add_cache_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to a command line."""
    about = "look at, verify or delete a folder of cached blocks"
    parser = commands.add_parser("cache", help=about, description=f"{about[0].upper()}{about[1:]}.")
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, about: str, run: Any) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        action.set_defaults(run=run)
        action.add_argument("folder", metavar="DIR", help="folder of a DiskStore")
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return action

    add("ls", "what is in it: objects and bytes by namespace, layer group and shard; also while it is in use", _ls)
    verify = add("verify", "read everything and compare checksums; exit code 1 where something is damaged", _verify)
    verify.add_argument("--secret-file", metavar="FILE", help="with the secret that the objects were made with")
    verify.add_argument("--remove", action="store_true", help="delete what is damaged")
    add("rm", "delete its files, and the folder if nothing else is in it", _rm)


def _ls(args: argparse.Namespace) -> int:
    from kvblocks.tiers.disk import read_folder

    try:
        found = read_folder(args.folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    kinds: dict[tuple[str | None, int | None, str | None], list[StoredObject]] = {}
    for each in found:
        kinds.setdefault(_parts(each.key), []).append(each)
    result = {
        "folder": args.folder,
        "objects": len(found),
        "bytes": sum(each.length for each in found),
        "kinds": [
            {
                "namespace": namespace,
                "group": group,
                "shard": shard,
                "objects": len(members),
                "bytes": sum(each.length for each in members),
                "first_stored": min(each.stored for each in members),
                "last_stored": max(each.stored for each in members),
            }
            for (namespace, group, shard), members in kinds.items()
        ],
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print_kinds(result)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from kvblocks.errors import StoreInUse
    from kvblocks.tiers.disk import DiskStore, read_folder
    from kvblocks.tiers.objects import fault_of, read_header
    from kvblocks.tiers.store import Status

    secret = read_secret(args.secret_file)
    try:
        read_folder(args.folder)  # a folder that is none is not made into one
        # Room for whatever is there: this lets nothing go.
        store = DiskStore(args.folder, 2**62)
    except (FileNotFoundError, StoreInUse) as error:
        raise UsageError(str(error)) from None
    faults: list[dict[str, str]] = []
    with store:
        objects = store.objects()
        lost = store.stats().lost
        for each in objects:
            buffer = memoryview(bytearray(each.length))
            [status] = store.load([each.key], [buffer])
            try:
                fault = f"the store answers {status.value}" if status is not Status.OK else fault_of(buffer, secret)
            except (ValueError, ModuleNotFoundError) as error:  # a secret that is too short, or xxhash is missing
                raise UsageError(str(error)) from None
            header = read_header(buffer)
            if fault is None and header is not None and header.key != each.key:
                fault = f"it is {header.key}"
            if fault is not None:
                faults.append({"key": each.key, "fault": fault})
        if args.remove:
            store.delete([entry["key"] for entry in faults])
    result = {
        "folder": args.folder,
        "objects": len(objects),
        "bytes": sum(each.length for each in objects),
        "damaged": faults,
        "damaged_files": lost,
        "removed": len(faults) if args.remove else 0,
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for entry in faults[:SHOWN]:
            print(f"{_printable(entry['key'])}: {entry['fault']}")
        if len(faults) > SHOWN:
            print(f"… and {len(faults) - SHOWN:,} more; --json lists all")
        if lost:
            print(f"{lost:,} files of it could not be read, and are deleted")
        print(f"{len(objects):,} objects, {len(faults):,} damaged{' and deleted' if args.remove and faults else ''}")
    return 1 if faults or lost else 0


def _rm(args: argparse.Namespace) -> int:
    from kvblocks.errors import StoreInUse
    from kvblocks.tiers.disk import remove_folder

    try:
        freed = remove_folder(args.folder)
    except (FileNotFoundError, StoreInUse) as error:
        raise UsageError(str(error)) from None
    if args.json:
        print(
            json.dumps({"folder": args.folder, "freed_bytes": freed, "folder_removed": not Path(args.folder).exists()})
        )
    else:
        print(f"{freed:,} bytes are free")
    return 0


def _parts(key: str) -> tuple[str | None, int | None, str | None]:
    """Namespace, group and shard of a block's key; nothing of another one."""
    found = re.fullmatch(r"kvb1/([0-9a-f]{64})/[0-9a-f]{64}/g([0-9]+)/([A-Za-z0-9._-]+)", key)
    return (None, None, None) if found is None else (found[1], int(found[2]), found[3])


def _printable(key: str) -> str:
    """A key as one line without control characters, whatever somebody put into the folder."""
    return key.encode("unicode_escape").decode()


def _print_kinds(result: dict[str, Any]) -> None:
    print(f"{result['folder']}: {result['objects']:,} objects, {result['bytes']:,} bytes")
    lines = [("namespace", "group", "shard", "objects", "bytes", "last stored")]
    for kind in result["kinds"]:
        known = kind["namespace"] is not None
        lines.append(
            (
                f"{kind['namespace'][:12]}…" if known else "(no blocks)",
                str(kind["group"]) if known else "",
                kind["shard"] if known else "",
                f"{kind['objects']:,}",
                f"{kind['bytes']:,}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(kind["last_stored"])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines if result["kinds"] else []:
        left, right = line[:3], line[3:]
        cells = [cell.ljust(width) for cell, width in zip(left, widths[:3], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(right, widths[3:], strict=True)]
        print("  ".join(cells).rstrip())
