"""The examples of the posterior run, in small form, and show what they say."""

from __future__ import annotations

import pytest


def test_from_npz(tmp_path):
    from kfaccore_numpy.examples import from_npz

    assert from_npz.main(from_npz.made(str(tmp_path / "layer.npz")))[0] == 4


def test_torch_examples():
    pytest.importorskip("torch")
    from kfaccore_torch.examples import continual, documents, laplace, quantised

    near, far = laplace.main(100)
    assert near > far
    assert documents.main(60)[0] == "the grass is green."
    trained, rounded, compensated = quantised.main(150)
    assert trained >= compensated >= rounded
    assert continual.main(60) > continual.main(60, remember=False) + 0.05
