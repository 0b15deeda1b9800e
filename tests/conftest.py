"""Namespaces: every test that takes `xp` runs on each of them; REQUIRE=torch,jax makes their absence a failure."""

from __future__ import annotations

import os
import tempfile

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it would take most of a GPU's memory, in each process

# Tests compile thousands of programs and run each once or twice: neither LLVM's passes nor MLIR's fusions pay.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
if "tensorflow" not in os.environ.get("REQUIRE", ""):  # whose XLA may not know them
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"

# Workers, and processes that tests start, compile the same programs: what one has compiled the others read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="kfaccore-tests-")  # the first process's, gone when it ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

REQUIRED = tuple(filter(None, os.environ.get("REQUIRE", "").split(",")))
for _name in REQUIRED:
    if not importlib.util.find_spec(_name):
        raise pytest.UsageError(f"REQUIRE names {_name}, which is not installed")
RAN: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Namespace:
    """Where a test's arrays live: `put` takes them there, `get` brings them back as NumPy; `whole` makes one program of
    a function where it can: eager JAX compiles each operation of each shape by itself."""

    name: str
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray]
    whole: Callable[[Callable], Callable] = lambda function: function


def _readonly(x: Any) -> np.ndarray:
    x = np.array(x)
    x.flags.writeable = False
    return x


def _strict() -> Namespace:
    import array_api_strict as strict

    strict.set_array_api_strict_flags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=("linalg", "fft")
    )
    return Namespace("strict", lambda x: strict.asarray(np.asarray(x)), np.asarray)


def _torch() -> Namespace:
    import torch

    torch.set_num_threads(1)
    return Namespace("torch", lambda x: torch.asarray(np.array(x)), lambda x: x.detach().numpy())


def _jax() -> Namespace:
    import jax

    jax.config.update("jax_enable_x64", True)
    return Namespace("jax", lambda x: jax.numpy.asarray(np.asarray(x)), np.asarray, jax.jit)


def _cupy() -> Namespace:
    import cupy

    return Namespace("cupy", cupy.asarray, lambda x: x.get() if hasattr(x, "get") else np.asarray(x))


def _has_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


def _namespaces() -> list[Namespace]:
    found = [Namespace("numpy", np.array, np.asarray), Namespace("readonly", _readonly, np.asarray), _strict()]
    for name, make in (("torch", _torch), ("jax", _jax)):
        if importlib.util.find_spec(name):
            found.append(make())
    if _has_gpu():
        found.append(_cupy())
    return found


NAMESPACES = _namespaces()
FEW = [n for n in NAMESPACES if n.name in ("numpy", "strict")]  # eager, own code and the standard's: cheap


@pytest.fixture(params=NAMESPACES, ids=lambda n: n.name)
def xp(request: pytest.FixtureRequest) -> Namespace:
    """One of the namespaces of this machine."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test."""
    return np.random.default_rng(20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m device` runs what needs a GPU, and nothing else."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if any(getattr(value, "name", None) == "cupy" for value in params.values()):
            item.add_marker("device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    if {"xp", "row"} <= set(params):
        report.user_properties.append(("pair", (params["xp"].name, params["row"].name)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs in the process that prints, whichever ran the test."""
    if report.when == "call" and report.passed:
        RAN.update(tuple(value) for name, value in report.user_properties if name == "pair")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if RAN and not hasattr(config, "workerinput"):
        namespaces, methods = (", ".join(sorted({pair[i] for pair in RAN})) for i in (0, 1))
        print(f"namespaces x methods: {namespaces} x {methods} ({len(RAN)} pairs)")


@pytest.fixture
def torch_double():
    """Torch's default dtype is float64 and its generator seeded, for one test."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
