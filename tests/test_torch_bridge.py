"""Tensors to core arrays and back: the right value or a clear error, never an abort."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kfaccore_torch.bridge import chosen, to_core, to_torch  # noqa: E402

X = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (X.T, X.T.tolist()),
        (X[::2, 1::2], X[::2, 1::2].tolist()),
        (X[:1].expand(3, 6), [X[0].tolist()] * 3),
        (torch._neg_view(X), (-X).tolist()),
        (torch.ones(2, dtype=torch.complex128).mul(1j).conj().imag, [-1.0, -1.0]),
        (X.clone().requires_grad_(), X.tolist()),
        (X.clone().requires_grad_() * 2, (X * 2).tolist()),
        (X.to(torch.bfloat16), X.tolist()),
        (X.to(torch.float16), X.tolist()),
        (torch.zeros(0, 3), []),
        (torch.tensor(3.0), 3.0),
        (torch.arange(3), [0, 1, 2]),
    ],
    ids=["transposed", "strided", "expanded", "neg", "conj", "leaf", "graph", "bf16", "f16", "empty", "0-d", "ids"],
)
@pytest.mark.parametrize("namespace", ["numpy", "torch"])
def test_out(tensor, value, namespace):
    found = to_core(tensor, namespace)
    assert found.tolist() == value
    assert "16" not in str(found.dtype)
    if namespace == "numpy":
        assert not found.flags.writeable
    else:
        assert not found.requires_grad


def test_out_is_a_view_and_read_only():
    x = X.clone()
    view = to_core(x, "numpy")
    x[0, 0] = 7.0
    assert view[0, 0] == 7.0
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1.0
    x[0, 0] = 8.0


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.sampled_from(["plain", "negative", "strided", "fortran", "read-only", "broadcast"]),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_in(shape, kind, dtype):
    x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    if kind == "negative":
        x = x[::-1]
    elif kind == "strided":
        x = np.repeat(x, 2, axis=0)[::2]
    elif kind == "fortran":
        x = np.asfortranarray(x)
    elif kind == "broadcast":
        x = np.broadcast_to(x, (2, *x.shape))
    elif kind == "read-only":
        x.flags.writeable = False
    like = torch.zeros(1, dtype=torch.float32)
    found = to_torch(x, like)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), x.astype(np.float32))
    if kind == "read-only" and found.numel():
        kept = x.copy()
        found += 1
        np.testing.assert_array_equal(x, kept)


def test_refusals():
    with pytest.raises(TypeError, match="meta"):
        to_core(torch.zeros(2, device="meta"), "numpy")
    with pytest.raises(TypeError, match="sparse"):
        to_core(X.to_sparse(), "numpy")
    with pytest.raises(ValueError, match="is on cpu, where cupy cannot view it"):
        to_core(X, "cupy")
    with pytest.raises(ValueError, match="need one of"):
        chosen("jax", X.device)
    with pytest.raises(ValueError, match="serves tensors on cuda, the model is on cpu"):
        chosen("cupy", X.device)
    with pytest.raises(ValueError, match="serves tensors on cpu, the model is on meta"):
        chosen("numpy", torch.device("meta"))
    assert chosen(None, X.device) == "numpy"
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(TypeError, match="Fake"):
        to_core(torch.zeros(2), "numpy")


def test_what_the_bridge_keeps_away_from():
    """DLPack loses the negative bit and aborts on negative strides: the day it does not, the bridge may use it."""
    lost = np.from_dlpack(torch._neg_view(torch.ones(2)))
    assert lost.tolist() == [1.0, 1.0]
    code = "import numpy, torch; torch.from_dlpack(numpy.zeros(3)[::-1])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
