"""Strict JAX for every test: float64, no silent promotion of dtypes or ranks."""

import os
import pathlib

# Compiling is most of what the tests do, and how well tiny programs are optimised is not tested.
# The older emitters of XLA's CPU backend take a third of the time of the newer ones, and a worker
# has one core. The notebooks and the tour run with the defaults.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def forget_programs():
    """Each compiled program holds on to mappings of memory, of which Linux grants 65 530; who asks
    for more is ended by a signal.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


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
