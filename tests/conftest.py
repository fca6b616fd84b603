"""What every test shares: hypothesis profiles, tests that need a GPU, and what is being tested."""

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: one slow example on a busy machine is not a fault. In CI the same examples every time.
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI")))
settings.register_profile("default", COMMON, max_examples=100)
settings.register_profile("long", COMMON, max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "default")


def package_folder() -> Path:
    spec = importlib.util.find_spec("kvblocks")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("kvblocks is not installed; run `python3 dev.py test`, or `pip install -e .` first")
    return Path(spec.origin).parent


def pytest_configure(config: pytest.Config) -> None:
    # Triton decides when it is imported. Without a GPU its interpreter runs the kernels, on CPU tensors.
    if not has_cuda():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # dev.py says which build it made, so that another one on the path is never tested in its place.
    expected = os.environ.get("KVBLOCKS_TESTED_BUILD")
    if expected and Path(expected).resolve() != package_folder().resolve():
        raise pytest.UsageError(f"these tests are for {expected}, but Python finds kvblocks in {package_folder()}")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_report_header() -> str:
    return f"kvblocks: {package_folder()}, hypothesis profile: {os.environ.get('HYPOTHESIS_PROFILE') or 'default'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not has_cuda():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Tests write to temporary folders: one that leaves a file beside pyproject.toml fails the run."""
    root = session.config.rootpath
    before = set(root.iterdir())
    result = yield
    left = sorted(path.name for path in set(root.iterdir()) - before if path.is_file())
    if left:
        session.testsfailed += 1
        print(f"\ntests left files in {root}: {', '.join(left)}")
    return result
