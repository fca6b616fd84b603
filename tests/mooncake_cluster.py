"""A Mooncake master and processes that lend memory, for tests and benchmarks inside a network namespace of their own.

Run as a script, it is such a process: `python tests/mooncake_cluster.py MASTER BYTES`.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HOST = "10.77.0.1"
START_SECONDS = 30
# Mooncake refuses a host that has only loopback. Nothing outside reaches these two interfaces.
ENTER = (
    "ip link set lo up && ip link add kv0 type veth peer name kv1 && "
    f'ip addr add {HOST}/24 dev kv0 && ip link set kv0 up && ip link set kv1 up && exec "$@"'
)


def inside(command: Sequence[str]) -> list[str]:
    """The command that runs `command` in a network namespace of its own, which ends with it."""
    return ["unshare", "--net", "--kill-child", "--fork", "bash", "-c", ENTER, "bash", *command]


def why_not() -> str:
    """What is missing for it, as a sentence; empty where nothing is."""
    if not all(shutil.which(tool) for tool in ("unshare", "ip")):
        return "needs unshare and ip (Debian: apt-get install util-linux iproute2)"
    try:
        import mooncake.store  # noqa: F401
    except ModuleNotFoundError:
        return 'needs mooncake; run: pip install "kvblocks[mooncake]"'
    except ImportError as error:
        return f"needs what mooncake needs (Debian: apt-get install libibverbs1 librdmacm1): {error}"
    if subprocess.run(inside(["true"]), capture_output=True, timeout=30).returncode:
        return "needs to make a network namespace with two interfaces, which takes root and a kernel that lets it"
    return ""


def run_inside() -> str:
    """Run this script anew in a namespace of its own, with `--inside` behind its arguments. Where that cannot be, or it
    is inside already, return: with what is missing, as `why_not`."""
    if sys.argv[-1:] == ["--inside"]:
        return ""
    missing = why_not()
    if not missing:
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        command = inside([sys.executable, *sys.argv, "--inside"])
        os.execvp(command[0], command)
    return missing


class Master:
    """A master that forgets quickly, so that tests need not wait."""

    def __init__(self, folder: Path, lease_ms: int = 1000, client_ttl: int = 5, discard: int = 1) -> None:
        import mooncake

        with socket.create_server((HOST, 0)) as probe:
            self.port = probe.getsockname()[1]
        self.address = f"{HOST}:{self.port}"
        binary = Path(str(mooncake.__file__)).with_name("mooncake_master")
        self.command = [str(binary), f"--rpc_address={HOST}", f"--rpc_port={self.port}"]
        self.command += ["--metrics_host=127.0.0.1", "--metrics_port=0"]
        self.command += [f"--default_kv_lease_ttl={lease_ms}", f"--client_ttl={client_ttl}"]
        self.command += [f"--put_start_discard_timeout_sec={discard}", "--enable_metric_reporting=false"]
        self.log = folder / "master.log"
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"mooncake_master did not start; it said: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(START_SECONDS)


@contextlib.contextmanager
def master(folder: Path, **settings: int) -> Iterator[Master]:
    started = Master(folder, **settings)
    try:
        yield started
    finally:
        started.kill()


@contextlib.contextmanager
def lender(master: Master, nbytes: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that lends memory, and has stored "from a lender" of 1 MiB."""
    command = [sys.executable, str(Path(__file__).resolve()), master.address, str(nbytes)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait(START_SECONDS)


def lend(address: str, nbytes: int) -> None:
    from kvblocks.tiers import MooncakeStore

    with MooncakeStore(address, segment=nbytes) as store:
        store.store(["from a lender"], [bytes(range(256)) * 4096])
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    lend(sys.argv[1], int(sys.argv[2]))
