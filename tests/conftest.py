"""Strict JAX for every test: float64, no silent promotion of dtypes or ranks.

The annotations of the package are checks.
"""

import gc
import os
import pathlib
import secrets
from importlib.metadata import version

from packaging.version import Version

# Compiling is most of what the tests do, and how well tiny programs are optimised is not tested.
# The older emitters of XLA's CPU backend, which jaxlib 0.11.1 no longer has, take a third of the
# time of the newer ones, and a worker has one core. XLA ends the process at a flag that it does not
# know. The notebooks and the tour run with the defaults.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (Version(version("jaxlib")) < Version("0.11")),
)

# A new seed for the random cases in each run; the workers of pytest-xdist inherit it.
os.environ.setdefault("IMPLICITJAX_SEED", str(secrets.randbits(32)))

import jax
import jaxtyping
import pytest
from beartype import beartype, BeartypeConf

ROOT = pathlib.Path(__file__).parents[1]
# Each call of the eager path runs these hundreds of times, and they hold no arrays.
UNCHECKED = ("_trace/_key.py", "_trace/_exact.py")
_checks = {}


def checked(signature):
    """The check of a signature: `beartype`, which looks at the first item of a list and not at one
    drawn at random. Kept, since a function within a function is decorated whenever it is made.
    """
    annotations = tuple(signature.__annotations__.items())
    key = (signature.__qualname__, signature.__code__.co_varnames, annotations)
    key = (signature.__module__, *key)
    if key not in _checks:
        _checks[key] = beartype(conf=BeartypeConf(is_random=False))(signature)
    return _checks[key]


PACKAGE = ROOT / "implicitjax"
FILES = {p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}
FILES -= {PACKAGE / name for name in UNCHECKED}
NAMES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted(FILES)]
jaxtyping.install_import_hook(NAMES, "tests.conftest.checked")

# A trace is many small objects. To look through all of them for cycles as often as Python does by
# default is a fifth of what the tests do.
gc.set_threshold(200_000, 50, 100)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_terminal_summary(terminalreporter):
    """Names the seed, also under pytest-xdist, where what a test prints is lost."""
    reports = [r for some in terminalreporter.stats.values() for r in some]
    for report in (r for r in reports if getattr(r, "when", None) == "call"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True)
def forget_programs():
    """Each compiled program holds on to mappings of memory, of which Linux grants 65 530; who asks
    for more is ended by a signal.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()  # a program may stand in a cycle


@pytest.fixture
def no_leaks():
    """`jax.checking_leaks`, which looks through all objects after each trace, but for old ones."""
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():
        yield
    gc.unfreeze()


@pytest.fixture
def unchecked(monkeypatch):
    """Runs a test without the checks of annotations, as users do: they come before ours."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def x32():
    """Runs a test with 64-bit types off, as most users have them."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def standard_promotion():
    """Runs a test in which the map itself promotes, as complex arithmetic with reals does."""
    with jax.numpy_dtype_promotion("standard"):
        yield
