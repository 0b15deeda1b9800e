"""Are records right, and do the default shells train, on models that nobody here wrote?

At least 20 public models, built small from their configurations with random weights. Per layer and one random
direction v, v^T F v from the records against brute force: (J v)^T H (J v) of the training loss for type-2, the squares
of each example's own slope for the empirical Fisher, both by a row of autograd for each number of the prediction, which
knows nothing of records; Monte-Carlo records in the mean over draws. Rows that mix examples are right in the mean over
random signs, so there type-2 is compared within sampling error. Then 20 steps of Optimizer and of Preconditioner with
SGD on one batch, and of AdamW at the best of three rates beside them (reported: the loss at the end, mean over seeds,
as a share of the first). Coverage is that of a plan by one forward: the share of the trainable numbers and the tensors
that have a Kronecker record, and those that the default Optimizer gives a diagonal, which count as not covered. Models
of full size are planned on the meta device. `make zoo` installs the libraries; one that does not import is `not run`.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import math
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from report import Claim, claim, finish, parser
from torch import nn
from zoo_models import LLAMA, WHOLE, ZOO, Entry, language

import kfaccore as kf
import kfaccore_torch as kt

QUICK = ("torchvision ViT", "torchvision MobileNetV2", "timm Mixer", "Llama, shifted", "BERT", "GCN on graphs")
EXACT = 1e-5  # some libraries compute parts in single precision whatever the model's
NOTHING = 1e-12  # of the largest layer: a curvature that is zero but for rounding
SEEDS = 3
RATES = (1e-2, 3e-3, 1e-3)  # of AdamW
MANY = 200  # draws of Monte-Carlo
COVERED = (
    "GPT-2",
    "GPT-2, own head",
    "Llama, shifted",
    "Llama, tied",
    "BERT",
    "T5",
    "Mixtral",
    "GCN on graphs",
    "SAGE on graphs",
    "diffusers UNet",
    "LSTM on text",
    "DLRM-like",
    "torchvision Swin v2",
    "torchvision ConvNeXt",
)
ENDS = ("Optimizer", "Preconditioner", "AdamW")
LEAST = 0.99  # of the numbers of each of them


@dataclass
class Found:
    """What one model gave."""

    layers: int = 0
    covered: float = math.nan
    tensors: tuple[int, int] = (0, 0)
    diagonal: float = math.nan
    mixing: int = 0
    type2: float = math.nan
    empirical: float = math.nan
    sampled: float = math.nan
    trained: dict[str, bool] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    why: str = ""


def quadratic(record: kf.Record, v: np.ndarray, draws: int = 1) -> tuple[float, np.ndarray]:
    """v^T F v of a record, and its share in each draw; a tied table has its draws as so many times the examples."""
    v = v.reshape(record.blocks, record.d_out, record.d_in)
    z = np.einsum("koi,kbsi->kbso", v, np.asarray(record.rows()))
    slopes = np.einsum("dkbso,kbso->dkb", np.asarray(record.g), z)
    shares = (slopes.sum(1) ** 2 if record.blocks == 1 else (slopes**2).sum(1)) / float(record.n)
    shares = shares.reshape(draws if record.draws == 1 else record.draws, -1).sum(1)
    return float(shares.sum()), shares


class Brute:
    """J v for one random v a layer and block, a row of J for every number of the prediction, by autograd alone."""

    def __init__(self, entry: Entry, layers: dict[str, Any]) -> None:
        self.entry = entry
        rng = torch.Generator().manual_seed(1)
        self.matrix: dict[str, np.ndarray] = {}
        moves: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        for name, layer in layers.items():
            v = {
                role: torch.randn(p.shape, generator=rng, dtype=p.dtype).numpy() for role, p in layer.parameters.items()
            }
            whole = self.matrix[name] = np.asarray(layer.matrix(v))
            for part in range(layer.kind.block().blocks):
                only = np.zeros_like(whole)
                only[part if whole.ndim == 3 else ...] = whole[part if whole.ndim == 3 else ...]
                moves[name, part] = {r: torch.as_tensor(np.array(x)) for r, x in layer.arrays(only).items()}
        places = [(name, role) for name, layer in layers.items() for role in layer.parameters]
        parameters = [layers[name].parameters[role] for name, role in places]
        self.f = entry.predict()
        self.u = {key: torch.zeros(self.f.numel()) for key in moves}
        for i, number in enumerate(self.f.reshape(-1)):
            grads = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
            row = dict(zip(places, grads, strict=True))
            for (name, part), move in moves.items():
                found = [(row[name, role] * x).sum() for role, x in move.items() if row[name, role] is not None]
                self.u[name, part][i] = sum(found) if found else 0.0

    def along(self, layer: str) -> list[torch.Tensor]:
        """J v of each block, like the prediction."""
        return [u.reshape(self.f.shape) for (name, _), u in self.u.items() if name == layer]

    def ggn(self, layer: str) -> float:
        """(J v)^T H (J v), H of the training loss."""
        f = self.f.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.entry.value(f), f, create_graph=True)
        pulls = ((u, torch.autograd.grad(slope, f, u, retain_graph=True)[0]) for u in self.along(layer))
        return sum(float((u * hu).sum()) for u, hu in pulls)

    def squares(self, layer: str) -> float:
        """(1/n) sum of the squared slopes of each example's own loss."""
        f = self.f.detach().requires_grad_()
        own = [torch.autograd.grad(x, f, retain_graph=True)[0] for x in self.entry.each(f)]
        return sum(float((g * u).sum()) ** 2 for u in self.along(layer) for g in own) / self.entry.n


def planned(entry: Entry, found: Found) -> None:
    """Coverage by numbers and by tensors: Kronecker records, and what is left to a diagonal."""
    report = kt.plan(entry.model, *entry.arguments[0], skip=entry.skip, **entry.arguments[1]).report()
    whole = [name for row in report.rows if row.rule != "-" for name in row.parameters]
    left = {name for row in report.rows if row.rule == "-" for name in row.parameters}
    found.covered = report.share
    found.tensors = len(set(whole) - left), len(set(whole) | left)
    found.diagonal = 1 - report.share


def compared(entry: Entry, found: Found) -> None:
    """Records of three Fishers against brute force."""
    settings: dict[str, Any] = {"skip": entry.skip}
    plan = kt.plan(entry.model, *entry.arguments[0], skip=entry.skip, **entry.arguments[1])
    given = (entry.model, entry.loss, entry.inputs, entry.target)
    exact, _ = kt.records(*given, fisher=kf.type2, **settings)
    own, _ = kt.records(*given, fisher=kf.empirical, **settings)
    many, _ = kt.records(*given, draws=MANY, **settings)
    brute = Brute(entry, {name: plan.layers[name] for name in exact})
    truth = {name: brute.ggn(name) for name in exact}
    least = NOTHING * max(truth.values())
    ratios = []
    for name, record in exact.items():
        wanted, matrix, mixing = truth[name], brute.matrix[name], record.batch < entry.examples
        found.layers += 1
        found.mixing += mixing
        if wanted < least:
            continue
        got = quadratic(record, matrix)[0]
        if mixing:
            values = [quadratic(r[name], matrix)[0] for r in _many(given, settings)]
            gap = abs(np.mean(values) - wanted)
            if gap > 6 * np.std(values) / len(values) ** 0.5 + EXACT * wanted:
                found.wrong.append(f"{name}: type2 {np.mean(values):.4g} for {wanted:.4g}")
        else:
            squares = brute.squares(name)
            errors = abs(got - wanted) / wanted, abs(quadratic(own[name], matrix)[0] - squares) / max(squares, least)
            found.type2 = np.nanmax([found.type2, errors[0]])
            found.empirical = np.nanmax([found.empirical, errors[1]])
            found.wrong += [f"{name}: off by {errors[0]:.2g}, {errors[1]:.2g}"] if max(errors) > EXACT else []
        shares = quadratic(many[name], matrix, MANY)[1]
        shares = shares * len(shares)
        ratios.append(shares.mean() / wanted)
        if abs(shares.mean() - wanted) > 6 * shares.std() / len(shares) ** 0.5:
            found.wrong.append(f"{name}: Monte-Carlo {shares.mean():.4g} for {wanted:.4g}")
    found.sampled = float(np.median(ratios)) if ratios else math.nan


_KEPT: dict[int, list] = {}


def _many(given: tuple, settings: dict[str, Any]) -> list:
    """Type-2 records under 24 draws of random signs, once a model."""
    if id(given[0]) not in _KEPT:
        _KEPT.clear()
        _KEPT[id(given[0])] = [kt.records(*given, fisher=kf.type2, seed=seed, **settings)[0] for seed in range(24)]
    return _KEPT[id(given[0])]


def trained(make: Callable[[], Entry], found: Found, steps: int = 20) -> None:
    """Losses of the default shells, and of AdamW, on one batch and several seeds."""
    for shell, run in (("Optimizer", whole), ("Preconditioner", stepwise)):
        losses = seeded(make, run, steps)
        found.trained[shell] = all(map(falls, losses))
        found.ends[shell] = end(losses)
    rivals = [end(seeded(make, partial(adamw, rate=rate), steps)) for rate in RATES]
    found.ends["AdamW"] = min(rivals, key=lambda share: math.inf if math.isnan(share) else share)


def seeded(make: Callable[[], Entry], run: Callable[..., list[float]], steps: int) -> list[list[float]]:
    """The losses of a run on each seed."""
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        found.append(run(make(), steps, seed))
    return found


def falls(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def end(losses: list[list[float]]) -> float:
    """The last loss as a share of the first, mean over seeds."""
    return float(np.mean([one[-1] / one[0] for one in losses]))


def whole(entry: Entry, steps: int, seed: int) -> list[float]:
    optimizer = kt.Optimizer(entry.model, entry.loss, skip=entry.skip, seed=seed)
    return [optimizer.step(entry.inputs, entry.target) for _ in range(steps)]


def stepwise(entry: Entry, steps: int, seed: int) -> list[float]:
    pre = kt.Preconditioner(entry.model, entry.loss, skip=entry.skip, seed=seed)
    sgd = torch.optim.SGD(entry.model.parameters(), 1e-3, 0.9)
    losses = []
    for _ in range(steps):
        sgd.zero_grad()
        with pre.capture():
            f = entry.predict()
        loss = pre.loss(f, entry.target)
        loss.backward()
        pre.step()
        nn.utils.clip_grad_norm_(entry.model.parameters(), 10.0)
        sgd.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(entry: Entry, steps: int, seed: int, rate: float) -> list[float]:
    optimizer = torch.optim.AdamW(entry.model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = entry.value(entry.predict())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def examined(make: Callable[[], Entry]) -> Found:
    """One model; a library that does not import leaves a reason."""
    found = Found()
    try:
        torch.manual_seed(0)
        entry = make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a library raises while it is imported or built
        found.why = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        return found
    try:
        planned(entry, found)
        compared(entry, found)
        trained(make, found)
    except Exception:
        found.wrong.append(traceback.format_exc().splitlines()[-1][:200])
    return found


def flattening() -> float:
    """A Llama of single precision after 40 steps: the largest relative gap between the loss of logits flattened and not
    over seeds; nan where the library does not import."""
    gaps = []
    for seed in range(SEEDS):
        ends = []
        for labels in ("shifted", "classes second"):
            torch.manual_seed(seed)
            try:
                entry = language("LlamaConfig LlamaForCausalLM", labels, **LLAMA)()
            except ImportError:
                return math.nan
            entry.model.float()
            ends.append(whole(entry, 40, seed)[-1])
        gaps.append(abs(ends[0] - ends[1]) / ends[1])
    return max(gaps)


def verdict(found: Found) -> str:
    if found.why:
        return "not run"
    return "wrong" if found.wrong else "right"


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", help="models whose name has this in it")
    given = asked.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = [n for n in ZOO if (not given.quick or n in QUICK) and (not given.only or given.only in n)]
    rows, claims = [], []
    results: dict[str, Found] = {}
    for name in names:
        begun = time.perf_counter()
        found = results[name] = examined(ZOO[name])
        learnt = ", ".join(f"{shell} {'falls' if good else 'RISES'}" for shell, good in found.trained.items())
        cells = (found.type2, found.empirical, found.sampled)
        share = f"{found.covered:.1%}, {found.tensors[0]} of {found.tensors[1]} tensors"
        rows.append(
            [
                name,
                found.layers,
                share,
                f"{found.diagonal:.1%}",
                found.mixing,
                *(f"{x:.2g}" for x in cells),
                learnt or found.why,
                ", ".join(f"{found.ends.get(name, math.nan):.2g}" for name in ENDS),
            ]
        )
        if not given.json:
            print(
                f"{name}: {verdict(found)}, {time.perf_counter() - begun:.0f} s {found.why} {found.wrong[:3]}",
                flush=True,
            )
    ran = {name: found for name, found in results.items() if not found.why}
    mismatched = [name for name, found in ran.items() if found.wrong]
    diverged = [name for name, found in ran.items() if not all(found.trained.values())]
    claims.append(counted("models whose records differ from brute force", mismatched, ran))
    claims.append(counted("models on which a default shell does not bring the loss down", diverged, ran))
    if not given.only or given.only in "flattened logits":
        torch.set_default_dtype(torch.float32)
        gap = flattening()
        good = None if math.isnan(gap) else gap <= 0.02
        claims.append(
            claim("Llama, float32, step 40: flattened logits against not, gap of the loss", gap, "<= 0.02", good)
        )
    need = len(QUICK) if given.quick else 20
    claims.append(claim("models run", float(len(ran)), f">= {need}", len(ran) >= need if not given.only else None))
    for name, found in results.items():
        if found.why:
            claims.append(claim(f"{name}: {found.why}", None, "imports", None))
    thin = [name for name in COVERED if name in ran and not ran[name].covered >= LEAST]
    here = {name: found for name, found in ran.items() if name in COVERED}
    claims.append(counted(f"models of which less than {LEAST:.0%} of the numbers are covered", thin, here))
    claims += [whole_size(name) for name in WHOLE if not given.only or given.only in name]
    columns = (
        "model",
        "layers",
        "covered",
        "diagonal",
        "mixing",
        "type2 error",
        "empirical error",
        "Monte-Carlo ratio",
        "20 steps",
        f"loss left: {', '.join(ENDS)}",
    )
    finish("Models nobody here wrote", columns, rows, claims, given.json)


def whole_size(name: str) -> Claim:
    """Seconds that a model of full size takes to plan, and the bytes of its state."""
    try:
        model, inputs = WHOLE[name]()
    except ImportError as error:
        return claim(f"{name}: {error}", None, "imports", None)
    begun = time.perf_counter()
    plan = kt.plan(model, **inputs)
    parts = plan.memory().values()
    seconds = time.perf_counter() - begun
    share = plan.report().share
    figure = f"{seconds:.1f} s, {share:.1%} covered, {sum(part.state for part in parts) / 1e9:.1f} GB of state"
    return claim(f"plan and memory of {name} on the meta device", figure, "< 10 s", seconds < 10 and share >= LEAST)


def counted(name: str, which: list[str], ran: dict) -> Claim:
    return claim(name, f"{len(which)}{f' ({chr(44).join(which)})' if which else ''}", "0", not which if ran else None)


if __name__ == "__main__":
    main()
