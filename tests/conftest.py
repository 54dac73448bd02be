"""What every test runs with: the CPU, a warm compile cache, few and repeatable random examples."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import tests.typechecker  # noqa: F401  # by name, for jaxtyping: see pyproject.toml
from tests.budget import Budget

MAPPINGS = 15_000  # of memory; a module of tests adds 10,000 at the most

settings.register_profile(
    "default", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before JAX is imported: a GPU only for tests that ask for it."""
    if config.option.markexpr != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    # The GPU interpreter blocks a thread of XLA's pool in every group of threads that waits at a
    # barrier: with a thread a core, two cores deadlock.
    os.environ.setdefault("NPROC", "8")
    cache = Path(__file__).parent.parent / ".cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config.pluginmanager.register(Budget(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is compiled alike runs one after the other."""
    items.sort(key=is_fully_compiled, reverse=True)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles for the CPU with few optimizations, which takes half as long.

    Programs of one kind of compilation are never taken for the other's.
    """
    import jax

    wanted = item.config.option.markexpr != "gpu" and not is_fully_compiled(item)
    if jax.config.read("jax_disable_most_optimizations") != wanted:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", wanted)


def is_fully_compiled(item: pytest.Item) -> bool:
    """Whether a test says that it compares bits."""
    return item.get_closest_marker("fully_compiled") is not None


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs before the process has no room for more.

    Each is several mappings of memory, of which Linux gives a process 65,530: the whole suite in
    one process reached that, and XLA crashed where it compiled the next one.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def strict_promotion():
    """Mixed dtypes raise: for code whose every cast is meant."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
