"""`kfaccore doctor`: what this machine offers, and what to change."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.results import text

FRAMEWORKS = ("numpy", "scipy", "array-api-strict", "torch", "jax", "tensorflow", "cupy")

ROUND_TRIPS = {  # run in a process of their own: a bad import can end it without an exception
    "torch": "import torch; y = np.from_dlpack(torch.from_dlpack(x))",
    "jax": "import jax.numpy as jnp; y = np.asarray(jnp.asarray(x))",
    "tensorflow": "import tensorflow as tf; y = np.from_dlpack(tf.convert_to_tensor(x))",
    "cupy": "import cupy; y = cupy.from_dlpack(cupy.asarray(x)).get()",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Check namespaces, BLAS, factorisations and DLPack round trips, and say what to change."""
    report = {
        "namespaces": _namespaces(),
        "blas": blas(),
        "rates": _rates(),
        "factorisations": _factorisations(),
        "dlpack": {name: _round_trip(code) for name, code in ROUND_TRIPS.items() if importlib.util.find_spec(name)},
    }
    report["advice"] = _advice(report)
    if as_json:
        typer.echo(text(report))
    else:
        _show(report)
    if not all(report["factorisations"].values()) or "failed" in report["dlpack"].values():
        raise typer.Exit(1)


def _namespaces() -> dict[str, str]:
    found = {}
    for name in FRAMEWORKS:
        if importlib.util.find_spec(name.replace("-", "_")):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "installed"
    return found


def blas() -> dict[str, Any]:
    """Name and version NumPy was built with, and the kernels OpenBLAS chose at run time."""
    import ctypes

    import numpy as np

    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index]
    found = {"name": built.get("name"), "version": built.get("version"), "core": None}
    for library in Path(np.__file__).parent.parent.glob("numpy.libs/*openblas*"):
        for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
            try:
                function = getattr(ctypes.CDLL(str(library)), name)
            except (AttributeError, OSError):
                continue
            function.restype = ctypes.c_char_p
            found["core"] = function().decode()
            break
    threads = {k: os.environ[k] for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if k in os.environ}
    return {**found, "threads": threads or "not set", "avx512": _has_avx512()}


def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _rates(d: int = 1024) -> dict[str, float]:
    """Float32 GFLOP/s of a product and of X^T X (counted as a full product: above the first means syrk is reached)."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((d, d)).astype(np.float32)
    other = x.copy()
    return {"gemm": _rate(lambda: x.T @ other, d), "syrk": _rate(lambda: x.T @ x, d)}


def _rate(function: Any, d: int) -> float:
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(2 * d**3 / min(times) / 1e9, 1)


def _factorisations() -> dict[str, bool]:
    import numpy as np

    from kfaccore import xp as kernels

    x = np.random.default_rng(0).standard_normal((1, 200, 100)).astype("float32")
    gram = kernels.to_host(kernels.gram(x) + np.eye(100, dtype=np.float32))
    inverse, code = map(kernels.to_host, kernels.spd_inverse(gram))
    values, vectors, _ = map(kernels.to_host, kernels.eigh(gram))
    exact = np.linalg.inv(gram[0].astype(np.float64))
    rebuilt = (vectors[0] * values[0]) @ vectors[0].T
    return {
        "cholesky": bool(code[0] == 0 and np.linalg.norm(inverse[0] - exact) < 1e-3 * np.linalg.norm(exact)),
        "eigh": bool(np.linalg.norm(rebuilt - gram[0]) < 1e-4 * np.linalg.norm(gram[0])),
    }


def _round_trip(code: str) -> str:
    program = f"import numpy as np; x = np.arange(6.0, dtype=np.float32); {code}; assert (y == x).all()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return "ok" if done.returncode == 0 else "failed"


def _advice(report: dict[str, Any]) -> list[str]:
    advice = []
    blas = report["blas"]
    if blas["avx512"] and blas["core"] in ("Haswell", "Zen"):
        forced = os.environ.get("OPENBLAS_CORETYPE")
        chose = f"OPENBLAS_CORETYPE={forced} forces" if forced else "OpenBLAS chose"
        change = "unset it to" if forced else "OPENBLAS_CORETYPE=SkylakeX can"
        advice.append(
            f"{chose} the AVX2 kernels ({blas['core']}) on an AVX-512 processor: {change} double the rate of products"
        )
    if blas["threads"] == "not set":
        advice.append("several processes on one machine: set OMP_NUM_THREADS=1 (or cores / processes) in each")
    if report["rates"]["syrk"] < 1.1 * report["rates"]["gemm"]:
        advice.append("X.T @ X is no faster than a product: this BLAS has no fast symmetric rank-k update")
    advice += [f"DLPack with {name} failed" for name, verdict in report["dlpack"].items() if verdict == "failed"]
    return advice


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "found", show_header=False)
    table.add_row("namespaces", ", ".join(f"{k} {v}" for k, v in report["namespaces"].items()))
    blas = report["blas"]
    table.add_row("BLAS", f"{blas['name']} {blas['version']}, core {blas['core']}, threads {blas['threads']}")
    table.add_row("float32 rates", ", ".join(f"{k} {v} GFLOP/s" for k, v in report["rates"].items()))
    table.add_row(
        "factorisations", ", ".join(f"{k} {'ok' if v else 'WRONG'}" for k, v in report["factorisations"].items())
    )
    table.add_row("DLPack", ", ".join(f"{k} {v}" for k, v in report["dlpack"].items()) or "no framework installed")
    console = Console()
    console.print(table)
    for line in report["advice"] or ["nothing to change"]:
        console.print(f"- {line}", soft_wrap=True)
