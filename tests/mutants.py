"""One-line mutants of the core: each must be killed by its tests. `python tests/mutants.py` exits 1 if one survives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants_of_gpu import OF_GPU
from mutants_of_laws import OF_LAWS
from mutants_of_noise import OF_NOISE
from mutants_of_uses import OF_USES

ROOT = Path(__file__).resolve().parents[1]

MUTANTS = [  # name, file, line as it is, line mutated, tests that must notice
    ("n dropped", "factors.py", "(1 - decay) / positive(stats.n), ok", "(1 - decay), ok", "test_record.py"),
    ("rows dropped", "factors.py", "(1 - decay) / positive(stats.rows), ok", "(1 - decay), ok", "test_identities.py"),
    (
        "rows and n swapped",
        "factors.py",
        "(1 - decay) / positive(stats.rows), ok",
        "(1 - decay) / positive(stats.n), ok",
        "test_record.py",
    ),
    (
        "G and A swapped",
        "linalg/inverse.py",
        "kron.apply(self.G, grad, self.A), code",
        "kron.apply(self.A, grad, self.G), code",
        "test_identities.py",
    ),
    (
        "mask counted",
        "linalg/grams.py",
        "if record.mask is None:\n        return zeros",
        "if True:\n        return zeros",
        "test_record.py",
    ),
    (
        "masked rows kept",
        "record/record.py",
        'put(self, "g", xp.where(mask[..., None], self.g, xp.zeros_like(self.g)))',
        "pass",
        "test_record.py",
    ),
    (
        "decay inverted",
        "factors.py",
        "decay = scalar(hyper.decay, state.weight)",
        "decay = 1 - scalar(hyper.decay, state.weight)",
        "test_preconditioner.py",
    ),
    ("draw weight lost", "fisher/draws.py", " * noise.shape[0] ** -0.5", "", "test_fisher.py"),
    (
        "reduce sums a",
        "record/sharing.py",
        "xp.mean(record.a, axis=-2, keepdims=True)",
        "xp.sum(record.a, axis=-2, keepdims=True)",
        "test_identities.py",
    ),
    (
        "reduce averages g",
        "record/sharing.py",
        "g = xp.sum(record.g, axis=-2, keepdims=True)",
        "g = xp.mean(record.g, axis=-2, keepdims=True)",
        "test_identities.py",
    ),
    ("pi inverted", "damping.py", "return pi * root, root / pi", "return root / pi, pi * root", "test_catalogue.py"),
    (
        "damping not rooted",
        "damping.py",
        "return xp.sqrt(xp.zeros_like(like) + scalar(damping, like))",
        "return xp.zeros_like(like) + scalar(damping, like)",
        "test_catalogue.py",
    ),
    (
        "exact damping dropped",
        "damping.py",
        "a[:, None, :] + joint(damping, a)",
        "a[:, None, :] + 0 * joint(damping, a)",
        "test_catalogue.py",
    ),
    (
        "factored scale lost",
        "linalg/kron.py",
        "side.transposed(left)) * scale",
        "side.transposed(left))",
        "test_laws.py",
    ),
    (
        "left side not transposed",
        "linalg/kron.py",
        "side.times(g, side.transposed(left))",
        "side.times(g, left)",
        "test_laws.py",
    ),
    (
        "bias column lost",
        "layers/linear.py",
        "return with_ones(_shared(x)) if self.bias else _shared(x)",
        "return _shared(x)",
        "test_layers.py",
    ),
    ("moments not squared", "record/squares.py", "kernels.gram_diagonal(j)", "xp.sum(j, axis=1)", "test_catalogue.py"),
    (
        "moments kept at refresh",
        "methods/kronecker/moments.py",
        "(basis, S, namespace(S).zeros_like(state.S_weight))",
        "(basis, S, state.S_weight)",
        "test_laws.py",
    ),
    (
        "bad stats averaged",
        "factors.py",
        "return counts(stats.finite, stats.rows, stats.n)",
        "return counts(stats.bad >= 0, stats.rows, stats.n)",
        "test_bad_input.py",
    ),
    (
        "failed inverse accepted",
        "linalg/inverse.py",
        "failed = (code >= int(Code.INDEFINITE)) | (weight == 0)",
        "failed = weight == 0",
        "test_bad_input.py",
    ),
    (
        "momentum before",
        "step/fixed.py",
        "weighted(self.momentum, old",
        "weighted(self.momentum**2, old",
        "test_preconditioner.py",
    ),
    ("clip without rate", "step/rescale.py", "(*sizes, none + lr)", "sizes", "test_preconditioner.py"),
    (
        "sign of a border",
        "convolution/autocorrelation.py",
        "block if count % 2 == 0 else -block",
        "-block",
        "test_patches.py",
    ),
    ("smoothing ignored", "fisher/losses.py", "self.smoothing / f.shape[-1]", "0.0", "test_fisher.py"),
    (
        "labels held in their own dtype",
        "fisher/positions.py",
        "target if real else signed(target)",
        "target",
        "test_fisher_positions.py",
    ),
    (
        "a head in which nothing counts divided by 0",
        "fisher/joint.py",
        "    return xp.where(n == 0, xp.ones_like(n), n)\n",
        "    return n\n",
        "test_fisher_joint.py",
    ),
    (
        "in-place activations: outputs instead of edges",
        "../kfaccore_torch/capture.py",
        "    return get_gradient_edge(output)\n",
        "    return output\n",
        "test_torch_capture.py",
    ),
    (
        "torch mean of squares: n without its half",
        "../kfaccore_torch/known_losses.py",
        "_numbers, times=2.0)",
        "_numbers, times=1.0)",
        "test_torch_losses.py",
    ),
    (
        "negative bit kept",
        "../kfaccore_torch/bridge.py",
        ".resolve_conj().resolve_neg()",
        "",
        "test_torch_bridge.py",
    ),
    (
        "attention's positions taken for examples",
        "../kfaccore_torch/places.py",
        "x = x.movedim(axis + self.inner, lead)",
        "x = x.movedim(axis + self.inner, lead + 0 * axis) if not self.axis else x.movedim(axis + self.inner, lead).flip(lead)",
        "test_torch_capture.py",
    ),
    (
        "decoupled decay forgotten",
        "../kfaccore_torch/moves.py",
        "x + shrink * layer.own(role, p.detach()) if shrink else x",
        "x",
        "test_torch_shells.py",
    ),
    (
        "triangle unpacked without its mirror",
        "precondition/placement.py",
        "back[rows, columns] = back[columns, rows] = np.arange(len(rows))",
        "back[:] = 0; back[rows, columns] = np.arange(len(rows))",
        "test_torch_distributed.py",
    ),
    (
        "greedy placement by name, not by load",
        "precondition/placement.py",
        "owner = min(group, key=lambda r: load[r])",
        "owner = min(group)",
        "test_torch_distributed.py",
    ),
    (
        "damped by the smallest convolution",
        "network/shared_damping.py",
        "reduce(xp.maximum",
        "reduce(xp.minimum",
        "test_shared_damping.py",
    ),
    (
        "a step not turned back",
        "network/two_level/turned.py",
        "kron.apply(self.Qg, v, side.transposed(self.Qa))",
        "kron.apply(self.Qg, v, self.Qa)",
        "test_two_level_shortcuts.py",
    ),
    (
        "no restart after a step taken back",
        "step/self_tuning.py",
        "restart=pick(good, motion.steps < 3, pick(told, True, motion.restart))",
        "restart=pick(good, motion.steps < 3, pick(told, False, motion.restart))",
        "test_jax_self_tuning.py",
    ),
    (
        "empirical draws taken for samples",
        "precondition/checks.py",
        "if pre.rule.needs_records and fisher is empirical:",
        "if False:",
        "test_step.py",
    ),
    (
        "one row of all examples added to each",
        "step/model.py",
        "rows[u.shape] = rows[u.shape] + u if u.shape in rows else u",
        "rows[0] = rows[0] + u if 0 in rows else u",
        "test_self_tuning.py",
    ),
    (
        "embedded positions taken before they meet the examples",
        "../kfaccore_torch/capture.py",
        'wide = {"x": index, "edge": get_gradient_edge(output), "shape": tuple(output.shape)}',
        'wide = {"x": index}',
        "test_torch_capture.py",
    ),
    *OF_GPU,
    *OF_LAWS,
    *OF_NOISE,
    *OF_USES,
]


def killed(file: str, old: str, new: str, tests: str) -> bool | None:
    """Whether the tests fail on a copy with `old` replaced by `new`; None if `old` is not there exactly once."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kfaccore", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for adapter in (ROOT / "adapters").iterdir():
            shutil.copytree(adapter, Path(folder) / adapter.name, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / "kfaccore" / file
        text = path.read_text()
        if text.count(old) != 1:
            return None
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode == 1


def main() -> None:
    survived = 0
    for name, *mutant in MUTANTS:
        verdict = {True: "killed", False: "SURVIVED", None: "PATTERN NOT FOUND"}[killed(*mutant)]
        survived += verdict != "killed"
        print(f"{name}: {verdict}", flush=True)
    print(f"{len(MUTANTS) - survived} of {len(MUTANTS)} mutants killed")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
