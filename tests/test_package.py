"""What is shipped: stubs that tell the truth, an sdist and a wheel that are whole, and modules others can build on."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from stub_docs import documented

import kvblocks

ROOT = Path(__file__).resolve().parent.parent
STUBS = sorted((ROOT / "kvblocks").glob("*.pyi"))
SOURCES = sorted((ROOT / "pyx").glob("*.pyx"))
EXT_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SHIPPED_SUFFIXES = {".py", ".pyi", ".pxd", ".typed"}


def python(code: str, *, cwd: Path, path: Path | None = None, **changes: str) -> str:
    """What `code` prints in a fresh interpreter in `cwd`, `path` first on sys.path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVBLOCKS_CHECKED")} | changes
    env.setdefault("CFLAGS", "-O0")  # compiled to be looked at, not to be fast
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def needs_build_tools() -> None:
    for module in ("setuptools", "Cython"):
        pytest.importorskip(module, reason=f"building needs {module}, which the `test` extra installs")


# --- stubs and names


def declared(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a stub that declare a name which exists at run time: not imports, nor private names for types."""
    kept: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            private_alias = node.target.id.startswith("_") and ast.unparse(node.annotation).endswith("TypeAlias")
            if not private_alias:
                kept.append(node)
        elif (
            isinstance(node, ast.ClassDef) and node.name.startswith("_") and "Protocol" in map(ast.unparse, node.bases)
        ):
            continue
        elif isinstance(node, ast.Assign | ast.ClassDef | ast.FunctionDef):
            kept.append(node)
    return kept


def names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_every_compiled_module_has_a_stub_and_declarations() -> None:
    modules = [source.stem for source in SOURCES]
    assert modules
    assert [stub.stem for stub in STUBS] == modules
    declared_alone = ["step_arrays"]  # structs, without a module
    assert sorted(path.stem for path in (ROOT / "kvblocks").glob("*.pxd")) == sorted([*modules, *declared_alone])


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.stem)
def test_every_name_in_a_stub_exists(stub: Path) -> None:
    module = importlib.import_module(f"kvblocks.{stub.stem}")
    assert str(module.__file__).endswith(EXT_SUFFIX)
    missing = []
    for node in declared(ast.parse(stub.read_text()).body):
        missing += [name for name in names(node) if not hasattr(module, name)]
        if isinstance(node, ast.ClassDef) and hasattr(module, node.name):
            owner = getattr(module, node.name)
            fields = getattr(owner, "__dataclass_fields__", {})
            members = [name for member in declared(node.body) for name in names(member)]
            missing += [f"{node.name}.{name}" for name in members if not hasattr(owner, name) and name not in fields]
    assert not missing


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.stem)
def test_a_stub_has_the_docstrings_of_its_module(stub: Path) -> None:
    found = list(documented(stub.read_text(), importlib.import_module(f"kvblocks.{stub.stem}")))
    assert found
    other = [name for name, node, docstring in found if ast.get_docstring(node) != docstring.strip()]
    assert not other, "run: python tests/stub_docs.py"


def test_every_public_name_of_the_package_exists() -> None:
    assert [name for name in kvblocks.__all__ if not hasattr(kvblocks, name)] == []
    with pytest.raises(AttributeError, match="'kvblocks' has no attribute 'no_such_name'"):
        _ = kvblocks.no_such_name


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kvblocks.__version__


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    [first, *_] = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(kvblocks.__version__)} \(\d{{4}}-\d\d-\d\d\)", first)


@pytest.mark.parametrize("name", ["__version__", "CacheConfig", "BlockManager", "NoFreeBlocks"])
def test_sizes_and_bookkeeping_import_no_torch(name: str, tmp_path: Path) -> None:
    code = f"import sys, kvblocks; kvblocks.{name}; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    assert python(code, cwd=tmp_path, path=Path(kvblocks.__file__).parent.parent) == "[]"


# --- sdist and wheel


def expected_in_package() -> set[str]:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kvblocks").rglob("*")
        if path.suffix in SHIPPED_SUFFIXES and "__pycache__" not in path.parts
    }
    return files | {f"kvblocks/{source.stem}{EXT_SUFFIX}" for source in SOURCES}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree."""
    needs_build_tools()
    work = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, work / "tree", ignore=ignored)
    shutil.copytree(ROOT / ".ci", work / "tree" / ".ci")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(work)!r}))"
    archive = work / python(code, cwd=work / "tree").splitlines()[-1]
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # not before Python 3.11.4; the default from 3.14 on
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(work / "unpacked")
    [top] = (work / "unpacked").iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes."""
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(sdist, work / "tree")
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(work)!r}))"
    return work / python(code, cwd=work / "tree").splitlines()[-1]


def test_an_sdist_holds_all_sources_and_nothing_generated(sdist: Path) -> None:
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    wanted = {name for name in expected_in_package() if not name.endswith(EXT_SUFFIX)}
    of_python = [(folder, {".py"}) for folder in ("tests", "examples", "benchmarks")]
    for folder, suffixes in [("pyx", {".pyx", ".pxd", ".pxi", ".h"}), *of_python]:
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    wanted |= {"setup.py", "pyproject.toml", "constraints.txt", "dev.py", ".ci/run", "LICENSE"}
    wanted |= {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".c", ".so", ".pyc", ".html"))] == []


def test_a_wheel_of_the_sdist_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name
    held = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in held if ".dist-info/" in name}
    assert held - info == expected_in_package()
    assert any(name.endswith("/licenses/LICENSE") for name in info)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with the wheel in it."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_works(site: Path, tmp_path: Path) -> None:
    code = """
        import kvblocks
        config = kvblocks.CacheConfig.for_memory(
            num_kv_heads=8, head_dim=128, num_layers=32, memory_bytes=10 * 2**30, dtype="bfloat16"
        )
        seq, cached = kvblocks.BlockManager(config.num_gpu_blocks, config.block_size).admit(list(range(100)))
        print(kvblocks.__file__, config.num_gpu_blocks, cached)
    """
    assert python(code, cwd=tmp_path, path=site) == f"{site / 'kvblocks' / '__init__.py'} 5120 0"


# A program outside the package, compiled against the wheel alone.
DOWNSTREAM = """
from libc.stdint cimport int64_t
from kvblocks.config cimport CacheConfig, itemsize

def sizes(CacheConfig config, dtype):
    cdef int64_t heads = config.num_kv_heads
    cdef int64_t dims = config.head_dim + config.v_head_dim
    cdef int64_t token = heads * dims * itemsize(dtype) * config.layers_per_group
    return token, config.token_bytes(dtype), config.block_bytes(dtype), config.memory_bytes(dtype)
"""


def test_downstream_cython_code_can_cimport_the_wheel(site: Path, tmp_path: Path) -> None:
    (tmp_path / "downstream.pyx").write_text(DOWNSTREAM)
    build = """
        from Cython.Build import cythonize
        from setuptools import Extension, setup
        extension = Extension("downstream", ["downstream.pyx"])
        setup(script_args=["-q", "build_ext", "--inplace"], ext_modules=cythonize([extension], language_level=3))
    """
    python(build, cwd=tmp_path, path=site)
    use = f"""
        import sys; sys.path.append({str(tmp_path)!r})
        import downstream, kvblocks
        config = kvblocks.CacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, num_gpu_blocks=1000, v_head_dim=64)
        print(*downstream.sizes(config, "bfloat16"))
        try:
            most = 2**31 - 1
            large = kvblocks.CacheConfig(num_layers=most, num_kv_heads=most, head_dim=1, num_gpu_blocks=1)
            downstream.sizes(large, "float32")
        except OverflowError as error:
            print(error)
    """
    sizes, error = python(use, cwd=tmp_path, path=site).splitlines()
    token = 8 * (128 + 64) * 2 * 32
    assert sizes == f"{token} {token} {token * 16} {token * 16 * 1000}"
    assert "does not fit in 64 bits" in error


# Reads an element past a view's end, and within the memory behind it.
PROBE = """
def read(unsigned char[:] view, Py_ssize_t i):
    return view[i]
"""


@pytest.mark.parametrize("checked", ["0", "1"])
def test_the_checked_build_is_the_one_that_checks(checked: str, tmp_path: Path) -> None:
    needs_build_tools()
    (tmp_path / "pyx").mkdir()
    (tmp_path / "kvblocks").mkdir()
    (tmp_path / "pyx" / "probe.pyx").write_text(PROBE)
    (tmp_path / "kvblocks" / "__init__.py").touch()
    (tmp_path / "README.md").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    build = "import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py')"
    python(build, cwd=tmp_path, KVBLOCKS_CHECKED_BUILD=checked)
    use = """
        from kvblocks.probe import read
        try:
            print(read(memoryview(bytearray(range(8)))[:4], 5))
        except IndexError:
            print("IndexError")
    """
    assert python(use, cwd=tmp_path, path=tmp_path) == {"0": "5", "1": "IndexError"}[checked]


def test_without_transformers_all_else_is_offered() -> None:
    code = """if True:
        import inspect, sys
        sys.modules["transformers"] = None
        from kvblocks import *
        import kvblocks
        assert BlockManager and "generate" not in kvblocks.__all__ and "generate" not in dir(kvblocks)
        inspect.getmembers(kvblocks)
        assert not hasattr(kvblocks, "generate") and not hasattr(kvblocks, "Pool")
        said = []
        for code in ("kvblocks.generate", "from kvblocks import generate", "from kvblocks import Pool", "kvblocks.x"):
            try:
                exec(code)
            except (AttributeError, ModuleNotFoundError) as error:
                said.append((type(error).__name__, str(error)))
        needs = 'kvblocks.{} needs transformers, which is not installed; run: pip install "kvblocks[generate]"'
        assert said == [
            ("AttributeError", needs.format("generate")),
            ("ModuleNotFoundError", needs.format("generate")),
            ("ModuleNotFoundError", needs.format("Pool")),
            ("AttributeError", "module 'kvblocks' has no attribute 'x'"),
        ], said
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
