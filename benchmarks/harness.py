"""What every benchmark shares: the machine in a few lines, interleaved timing, a table of ratios, JSON beside it.

A benchmark builds `Row`s with `compare`, and hands them to `report`. Imports no contender and nothing of kvblocks.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["Row", "clock_cost", "compare", "machine", "report"]

RESULTS = Path(__file__).parent / "results"
_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Row:
    """One workload, and the median seconds that each contender took for it."""

    workload: str
    seconds: Mapping[str, float]
    # What the seconds are of (bytes moved, calls made), where that helps to read them.
    amount: float | None = None
    unit: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    # "B" where `seconds` are bytes, for benchmarks of memory.
    measure: str = "s"


def compare(
    contenders: Mapping[str, Callable[[], object]], repeats: int = 9, clock: str = "wall", warm: bool = True
) -> dict[str, float]:
    """Median seconds of each contender. They take turns, so that what else the machine does hits all alike.

    Args:
        contenders: what to call, by name.
        repeats: timed calls of each.
        clock: "wall", or "cpu" for the CPU time of this process.
        warm: whether each is called once before the clock runs.
    """
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for contender in contenders.values() if warm else ():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, contender in contenders.items():
                start = now()
                result = contender()
                times[name].append(now() - start)
                del result  # outside the clock: what giving memory back costs is not the contender's
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def clock_cost(now: Callable[[], float]) -> float:
    """Seconds that a pair of readings of this clock adds to what lies between them; the CPU clock is a system call."""
    readings = [now() for _ in range(2001)]
    return statistics.median(later - earlier for earlier, later in pairwise(readings))


def machine(packages: Sequence[str] = ("torch", "numpy")) -> dict[str, str]:
    """The processor, the system, and the versions of what was measured."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        caches = [f"L{_read(index, 'level')} {_read(index, 'size')}" for index in _caches()]
        cpu = f"{names[0] if names else cpu}, {os.cpu_count()} cores" + (f", {', '.join(caches)}" if caches else "")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": cpu,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def report(title: str, rows: Sequence[Row], *, ours: str, workload: str, about: Mapping[str, str], name: str) -> Path:
    """Print a table of every contender's time over ours (above 1: we are faster), and write all of it as JSON.

    Args:
        ours: the contender that the others are measured against.
        workload: one line that says what was done.
        about: what `machine` gave.
        name: of the file, `results/{name}.json`.
    """
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.seconds if rival != ours))
    header = ["", ours, *rivals]
    table = []
    for row in rows:
        took = row.seconds[ours]
        cells = [row.workload, f"{took:.4g} B" if row.measure == "B" else _shown(took, row.amount, row.unit)]
        for rival in rivals:
            cells.append(f"{row.seconds[rival] / took:.2f} x" if rival in row.seconds else "")
        table.append(cells)
    print(*[f"{key}: {value}" for key, value in about.items()], f"workload: {workload}", sep="\n")
    _print(f"{title} (x: how many times what {ours} takes)", header, table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"title": title, "workload": workload, **about, "ours": ours, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return path


def _shown(seconds: float, amount: float | None, unit: str) -> str:
    scale, name = next((pair for pair in _SCALES if seconds >= pair[0]), _SCALES[-1])
    text = f"{seconds / scale:.3g} {name}"
    return text if amount is None else f"{text}, {amount / seconds:.3g} {unit}"


def _print(title: str, header: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
        print(title)
        for line in [header, *table]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        shown.add_column(column, justify="right" if i else "left")
    for line in table:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _caches() -> list[Path]:
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return [index for index in found if _read(index, "type") != "Instruction"]


def _read(folder: Path, name: str) -> str:
    path = folder / name
    return path.read_text().strip() if path.exists() else ""
