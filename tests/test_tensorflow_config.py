"""Settings saved with a Keras model: public names now, the files of older versions before, one object either way."""

from __future__ import annotations

import importlib
import json

import pytest

import kfaccore as kf
from kfaccore.methods import CATALOGUE

pytest.importorskip("tensorflow")
pytest.importorskip("keras")
config = importlib.import_module("kfaccore_tensorflow.config")
Settings = importlib.import_module("kfaccore_tensorflow.step").Settings
MOVED = importlib.import_module("kfaccore_tensorflow.moved").MOVED

OLD = [
    "kfaccore.comm:Serial",
    "kfaccore.linalg.blocks:Dense",
    "kfaccore.linalg.lowrank:Rank",
    "kfaccore.linalg.recursion:Rule",
    "kfaccore.linalg.recursion:Unlimited",
    "kfaccore.linalg.sketch:Symmetric",
    "kfaccore.linalg.toeplitz:UpperToeplitz",
    "kfaccore.linalg.triangular:Hierarchical",
    "kfaccore.linalg.two_terms:absolute",
    "kfaccore.linalg.window:Window",
    "kfaccore.methods.brand:BrandKFAC",
    "kfaccore.methods.brand_c:Correction",
    "kfaccore.methods.brand_r:BrandRKFAC",
    "kfaccore.methods.cgfac:CGFAC",
    "kfaccore.methods.deflation:Deflation",
    "kfaccore.methods.diagonal:Diagonal",
    "kfaccore.methods.ekfac:EKFAC",
    "kfaccore.methods.exact:Exact",
    "kfaccore.methods.fngd:FNGD",
    "kfaccore.methods.identity:Identity",
    "kfaccore.methods.kfac:KFAC",
    "kfaccore.methods.kfac_corrected:KFACCorrected",
    "kfaccore.methods.kpsvd:KPSVD",
    "kfaccore.methods.lanczos:Lanczos",
    "kfaccore.methods.pinn_kfac:PINNKFAC",
    "kfaccore.methods.randomized:RandomizedKFAC",
    "kfaccore.methods.singd:IKFAC",
    "kfaccore.methods.skfac:SKFAC",
    "kfaccore.methods.tekfac:TEKFAC",
    "kfaccore.methods.tkfac:TKFAC",
    "kfaccore.network.coarse:Nicolaides",
    "kfaccore.network.corrections:deflate_last",
    "kfaccore.network.matrices:exact",
    "kfaccore.network.pooling:grid",
    "kfaccore.network.tridiagonal:Tridiagonal",
    "kfaccore.network.turned:Turned",
    "kfaccore.network.two_level:TwoLevel",
    "kfaccore.preconditioner:Preconditioner",
    "kfaccore.record:dense",
    "kfaccore.rescale:KLClip",
    "kfaccore.schedule:Clocks",
    "kfaccore.sharing:expand",
    "kfaccore.stacked.factors:fewer_rows",
    "kfaccore.stacked.operators:Empirical",
    "kfaccore.stacked.operators:Kron",
    "kfaccore.stacked.operators:KronFactored",
    "kfaccore.stacked.shares:MeanVector",
    "kfaccore_tensorflow.engine:Settings",
]

# as the version before the rooms were rearranged wrote it
SAVED = {
    "object": "kfaccore.methods.kfac:KFAC",
    "fields": {
        "sharing": {"function": "kfaccore.sharing:reduce"},
        "inverse": {"object": "kfaccore.linalg.inverse:Eigh", "fields": {}},
        "split": {"object": "kfaccore.damping:Pi", "fields": {}},
    },
}


@pytest.mark.parametrize("name", OLD)
def test_names_of_older_versions_are_found(name):
    module, attribute = name.split(":")
    found = config.decoded({"function": name})
    assert found is getattr(importlib.import_module(MOVED.get(name, MOVED.get(module))), attribute)


def test_every_moved_room_is_tried():
    assert {name.split(":")[0] for name in OLD} == {name.split(":")[0] for name in MOVED}
    assert {name for name in MOVED if ":" in name} <= set(OLD)


def test_a_method_saved_by_an_older_version():
    assert config.decoded(SAVED) == kf.KFAC(sharing=kf.reduce, inverse=kf.eigh, split=kf.pi)


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_methods_come_back_equal_under_public_names(name):
    method = CATALOGUE[name]()
    saved = json.loads(json.dumps(config.encoded(method)))
    assert saved["object"] == f"kfaccore:{type(method).__name__}"
    assert config.decoded(saved) == method


def test_core_is_saved_whole_and_refuses_a_second_opinion():
    core = kf.Preconditioner(kf.EKFAC(), kf.Clocks(2, 4), kf.Schedules(0.1), step=kf.SelfTuning(), donate=True)
    settings = Settings(core=core, strict=False)
    assert (settings.step, settings.clocks, settings.method) == (core.rule, core.clocks, core.methods)
    assert config.decoded(json.loads(json.dumps(config.encoded(settings)))) == settings
    assert settings.preconditioner() is core
    with pytest.raises(ValueError, match="both core and clocks are given"):
        Settings(core=core, clocks=kf.Clocks(3, 3))
    with pytest.raises(TypeError, match=r"need a kfaccore\.Preconditioner"):
        Settings(core=kf.KFAC())
