"""A CUDA device that computes on the CPU, for a torch without CUDA: `pretended.cpp`, and what torch.cuda says of it.

    python -m pytest -p pretended -m device tests/test_torch_gpu.py

Import it before kfaccore. Memory of the device and of the host are told apart as on a GPU, graphs are recorded and
played again, and `waited()` counts how often the host waits; time, memory in use, TF32 and the order of sums are the
CPU's. LSTM and depthwise convolutions, for which CUDA has kernels of its own, are not there. Needs g++ for half a
minute, or in PRETENDED what `compiled` made before.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NOTHING = ("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
SAID = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "pretended",
    "memory_allocated": 0,
    "max_memory_allocated": 0,
}


def compiled() -> Path:
    """The extension, for the torch that is installed."""
    found = Path(tempfile.mkdtemp(prefix="pretended-")) / "pretended_device.so"
    root = Path(torch.__file__).parent
    folders = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    command = ["g++", "-O0", "-w", "-std=c++17", "-shared", "-fPIC", str(Path(__file__).with_suffix(".cpp"))]
    command += ["-o", str(found), *(f"-I{folder}" for folder in folders)]
    command += [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    command += [f"-l{name}" for name in ("torch", "torch_cpu", "torch_python", "c10")]
    subprocess.run(command, check=True)
    return found


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretended_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILE = os.environ.get("PRETENDED") or str(compiled())
_device: Any = _loaded(Path(FILE))
waited = _device.waited


class Graph:
    """Of `torch.cuda.CUDAGraph`, what is used."""

    tape = -1

    def replay(self) -> None:
        _device.replay(self.tape)


class Recording:
    """`torch.cuda.graph`."""

    def __init__(self, graph: Graph, capture_error_mode: str = "global") -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.tape = _device.begin()

    def __exit__(self, *_: object) -> None:
        _device.end()


class _Generators(type):
    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, _GENERATOR)


class Generator(metaclass=_Generators):
    """`torch.Generator`, of the CPU whatever the device."""

    def __new__(cls, device: object = "cpu"):
        return _GENERATOR()


_GENERATOR = torch.Generator
_CLONE = torch.UntypedStorage.clone


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type == "cpu":
        return _CLONE(storage)
    bytes_ = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (storage.nbytes(),), (1,))
    return bytes_.clone().untyped_storage()


def _install() -> None:
    cuda: Any = torch.cuda
    for name in NOTHING:
        setattr(cuda, name, lambda *_, **__: None)
    for name, value in SAID.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.CUDAGraph = Graph
    cuda.graph = Recording
    torch.Generator = Generator
    torch.UntypedStorage.clone = _clone


_install()
