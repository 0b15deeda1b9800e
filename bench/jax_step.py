"""Step time of K-FAC under jit, over a jitted first-order step: classic autoencoder, CNN, transformer.

Clocks 10/100: statistics every 10 steps, inverses every 100. Kinds of step are timed apart, all of them once a round,
and weighted 90:9:1. All steps, the first-order one too, donate parameters and state, as loops do. The self-tuning step
is one program for all kinds; it judges every step.
CPU seconds of plan, init, trace and compile are of a transformer of 12 blocks.
MB: what the largest program needs besides its inputs, by XLA. kfac-jax, where installed (0.0.8 needs jax 0.8), runs the
same models in the same process at clocks 5/10, so that every kind comes up often, weighted alike. The outside route
runs the core on NumPy through DLPack.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import arguments, at_most, finish, interleaved

import kfaccore as kf
import kfaccore_jax as kj

SIZES = (1000, 500, 250, 30, 250, 500, 1000, 784)
KINDS = {"plain": (False, False), "measured": (True, False), "refreshed": (True, True)}
WEIGHTS = {"plain": 0.9, "measured": 0.09, "refreshed": 0.01}


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, size in enumerate(SIZES):
            x = nn.Dense(size)(x)
            x = x if i + 1 in (4, len(SIZES)) else nn.sigmoid(x)
        return x


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (16, 32, 64):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(channels, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    width: int = 64
    blocks: int = 2

    @nn.compact
    def __call__(self, ids):
        position = self.param("position", nn.initializers.normal(0.02), (32, self.width))
        x = nn.Embed(200, self.width)(ids) + position
        for _ in range(self.blocks):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, y)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A model, its loss, and a batch."""

    name: str
    net: Any
    loss: Any
    x: Any
    y: Any
    base: str

    @property
    def optimiser(self) -> optax.GradientTransformation:
        return optax.sgd(1e-3, 0.9) if self.base == "SGD" else optax.adam(1e-4)


def cases(quick: bool) -> list[Case]:
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(512, 784)), jnp.float32)
    pictures = jnp.asarray(rng.normal(size=(64, 16, 16, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 64))
    found = [Case("autoencoder", Autoencoder(), kf.Bernoulli(), images, images, "SGD")]
    if not quick:
        tokens = jnp.asarray(rng.integers(0, 200, (64, 32)))
        found += [
            Case("CNN", CNN(), kf.SoftmaxCrossEntropy(), pictures, labels, "Adam"),
            Case("transformer", Transformer(), kf.SoftmaxCrossEntropy(), tokens, labels, "Adam"),
        ]
    return found


def first_order(case: Case, params: Any) -> Callable[[], Any]:
    """A jitted step of SGD or Adam."""
    tx, n = case.optimiser, len(case.x)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(lambda p: case.loss.value(case.net.apply(p, x), y) / n)(params)
        moves, state = tx.update(grads, state, params)
        return optax.apply_updates(params, moves), state, value

    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run() -> None:
        *held[:], _ = jax.block_until_ready(step(*held, case.x, case.y))

    return run


class Ours:
    """The three kinds of a K-FAC step, compiled apart; `compiling` seconds and `memory` bytes of the largest."""

    def __init__(self, case: Case, params: Any) -> None:
        self.plan = kj.plan(case.net.apply, params, case.x)
        self.case, self.params, n = case, params, len(case.x)
        tx = kj.kfac(self.plan, schedules=kf.Schedules(damping=0.1))
        noise = jnp.asarray(kf.draw_noise(case.loss, self.output(), 1, np.random.default_rng(1)), jnp.float32)

        def step(params, state, x, y, noise, measure, refresh):
            captured = kj.capture(self.plan, params, x)
            f = captured.prediction
            slope = case.loss.gradient(f, y) / n
            draws = kf.monte_carlo(case.loss, f, noise)
            records = captured.records(draws, float(n)) if measure else None
            grads, factored = captured.gradients(slope), captured.factored(slope)
            moves, state = tx.update(grads, state, records=records, fresh=refresh, factored=factored)
            return jax.tree.map(lambda p, d: p - 1e-3 * d, params, moves), state, case.loss.value(f, y) / n

        self.state, self.noise = tx.init(params), noise
        self.moved = jax.tree.map(jnp.copy, params)
        given, start = (params, self.state, case.x, case.y, noise), time.perf_counter()
        self.compiled = {}
        for kind, (measure, refresh) in KINDS.items():
            jitted = jax.jit(step, static_argnums=(5, 6), donate_argnums=(0, 1))
            self.compiled[kind] = jitted.lower(*given, measure, refresh).compile()
        self.compiling = time.perf_counter() - start
        self.memory = needed(self.compiled["refreshed"])

    def output(self) -> tuple[int, ...]:
        return jax.eval_shape(self.case.net.apply, self.params, self.case.x).shape

    def __call__(self, kind: str) -> Any:
        done = self.compiled[kind](self.moved, self.state, self.case.x, self.case.y, self.noise)
        self.moved, self.state, value = jax.block_until_ready(done)
        return value

    def kinds(self) -> dict[str, Callable[[], Any]]:
        return {kind: partial(self, kind) for kind in KINDS}

    def outside(self) -> dict[str, Callable[[], Any]]:
        """The same steps with the core on NumPy: front, core and back, and the way between alone."""
        case, plan, n = self.case, self.plan, float(len(self.case.x))

        @jax.jit
        def front(params, x, y, noise):
            captured = kj.capture(plan, params, x)
            slope = case.loss.gradient(captured.prediction, y) / n
            grads, factored = captured.gradients(slope), captured.factored(slope)
            records = captured.records(kf.monte_carlo(case.loss, captured.prediction, noise), n)
            return records, {**plan.matrices(grads), **factored}

        @jax.jit
        def back(params, moves):
            return jax.tree.map(lambda p, d: p - 1e-3 * d, params, plan.tree(params, moves))

        pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(10, 100), kf.Schedules(0.1))
        records, grads = kj.exported(front(self.params, case.x, case.y, self.noise))
        state = pre.init(plan.blocks, np.zeros(1, np.float32))
        moves, state, _ = pre.step(state, records, grads)

        def between():
            kj.exported(jax.block_until_ready(self.last))
            return jax.block_until_ready(kj.imported(moves))

        self.last = front(self.params, case.x, case.y, self.noise)

        def whole():
            found = front(self.params, case.x, case.y, self.noise)
            given, grads = kj.exported(found)
            updates, _, _ = pre.step(state, given, grads)
            return jax.block_until_ready(back(self.params, kj.imported(updates)))

        return {"outside": whole, "DLPack": between}


class Tuned:
    """The self-tuning step: one program, told the kind of step by the count in its state."""

    def __init__(self, case: Case, params: Any, ours: Ours) -> None:
        plan, n = ours.plan, len(case.x)
        tx = optax.chain(kj.kfac(plan, clocks=kf.Clocks(10, 100), step=kf.SelfTuning()), optax.scale(-1.0))

        def step(params, state, x, y, noise):
            captured = kj.capture(plan, params, x)
            f = captured.prediction
            slope = case.loss.gradient(f, y) / n
            grads, factored = captured.gradients(slope), captured.factored(slope)
            records = captured.records(kf.monte_carlo(case.loss, f, noise), float(n))
            judged = {
                "value": case.loss.value(f, y) / n,
                "value_fn": lambda p: case.loss.value(case.net.apply(p, x), y) / n,
            }
            moves, state = tx.update(grads, state, params, records=records, factored=factored, **judged)
            return optax.apply_updates(params, moves), state, judged["value"]

        params = jax.tree.map(jnp.copy, params)
        self.params, self.state, self.rest = params, tx.init(params), (case.x, case.y, ours.noise)
        start = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, self.state, *self.rest).compile()
        self.compiling = time.perf_counter() - start
        self.memory = needed(self.compiled)
        for _ in range(4):  # past the first steps, which refresh off the clock
            self("refreshed")

    def __call__(self, kind: str) -> Any:
        """A step of the run, at the place of the clock that makes it of this kind."""
        (kfac, rest), at = self.state, {"plain": 1, "measured": 10, "refreshed": 100}[kind]
        core = replace(kfac.core, step=jnp.asarray(at))
        state = kfac._replace(core=core), rest
        done = self.compiled(self.params, state, *self.rest)
        self.params, self.state, _ = jax.block_until_ready(done)

    def kinds(self) -> dict[str, Callable[[], Any]]:
        return {f"tuned {kind}": partial(self, kind) for kind in KINDS}


def needed(compiled: Any) -> int:
    """Bytes of a program's temporaries, and of outputs that take no donated input's place."""
    used = compiled.memory_analysis()
    return used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes if used else 0


def kfac_jax_steps(case: Case, params: Any, adaptive: bool, rounds: int) -> dict[str, float]:
    """Median seconds of kfac-jax's kinds of step, and of its first one (mostly compilation)."""
    import kfac_jax

    def loss(params, batch):
        f = case.net.apply(params, batch[0])
        if isinstance(case.loss, kf.Bernoulli):
            kfac_jax.register_multi_bernoulli_predictive_distribution(f, batch[1])
        else:
            kfac_jax.register_softmax_cross_entropy_loss(f, batch[1])
        return case.loss.value(f, batch[1]) / len(batch[0])

    optimiser = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=adaptive,
        use_adaptive_momentum=adaptive,
        use_adaptive_damping=adaptive,
        initial_damping=0.1,
        inverse_update_period=10,
        curvature_update_period=5,
        num_burnin_steps=0,
        multi_device=False,
    )
    numbers = {} if adaptive else {"learning_rate": 1e-3, "momentum": 0.9, "damping": 0.1}
    key, batch = jax.random.key(0), (case.x, case.y)
    params = jax.tree.map(jnp.copy, params)
    state = optimiser.init(params, key, batch)
    times: dict[str, list[float]] = {"plain": [], "measured": [], "refreshed": [], "first": []}
    for i in range(10 * rounds + 11):
        start = time.perf_counter()
        params, state, _ = optimiser.step(params, state, key, batch=batch, global_step_int=i, **numbers)
        jax.block_until_ready(params)
        kind = "first" if i == 0 else "refreshed" if i % 10 == 0 else "measured" if i % 5 == 0 else "plain"
        if i == 0 or i > 10:
            times[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(found) for kind, found in times.items() if found}


def compiled_of_twelve() -> tuple[list[list], list[dict[str, str]]]:
    """CPU seconds of plan, init, trace and compile of 12 blocks of width 128: of one program that is told whether to
    refresh, and of two, each of which knows."""
    net = Transformer(128, 12)
    loss = kf.SoftmaxCrossEntropy()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 200, (16, 32)))
    y = jnp.asarray(rng.integers(0, 10, 16))
    noise = jnp.asarray(rng.uniform(size=(1, 16)), jnp.float32)
    params = net.init(jax.random.key(0), x)

    def seconds(*flags: Any) -> float:
        start = time.process_time()
        plan = kj.plan(net.apply, params, x)
        tx = kj.kfac(plan, schedules=kf.Schedules(damping=0.1))

        def step(params, state, x, y, noise, fresh):
            captured = kj.capture(plan, params, x)
            slope = loss.gradient(captured.prediction, y) / 16
            draws = kf.monte_carlo(loss, captured.prediction, noise)
            given = {"records": captured.records(draws, 16.0, fisher=kf.monte_carlo), "fresh": fresh}
            grads, factored = captured.gradients(slope), captured.factored(slope)
            moves, state = tx.update(grads, state, factored=factored, **given)
            return jax.tree.map(lambda p, d: p - 1e-3 * d, params, moves), state

        state = tx.init(params)
        for flag in flags:
            program = jax.jit(step, static_argnames="fresh" if isinstance(flag, bool) else ())
            program.lower(params, state, x, y, noise, fresh=flag).compile()
        return time.process_time() - start

    def sgd(params, x, y):
        grads = jax.grad(lambda p: loss.value(net.apply(p, x), y) / 16)(params)
        return jax.tree.map(lambda p, d: p - 1e-3 * d, params, grads)

    start = time.process_time()
    jax.jit(sgd).lower(params, x, y).compile()
    found = {"SGD": time.process_time() - start, "one program": seconds(jnp.asarray(True)), "two": seconds(True, False)}
    rows = [["12 blocks of width 128", kind, *[""] * 5, spent, ""] for kind, spent in found.items()]
    what = "12 blocks of width 128: CPU seconds of plan, init, trace and compile"
    claims = [at_most(f"{what}, one program with and without a refresh", found["one program"], 14.0)]
    return rows, [*claims, at_most(f"{what}, a program each", found["two"], 14.0)]


def mixed(times: dict[str, float]) -> float:
    return sum(WEIGHTS[kind] * times[kind] for kind in WEIGHTS)


def rivals(case: Case, params: Any, quick: bool) -> dict[str, dict[str, float]]:
    """kfac-jax's modes that ran."""
    found = {}
    for mode in ("fixed",) if quick else ("fixed", "adaptive"):
        if importlib.util.find_spec("kfac_jax") is None:
            break
        try:
            found[mode] = kfac_jax_steps(case, params, mode == "adaptive", 1 if quick else 3)
        except Exception as error:
            print(f"kfac-jax {mode} on {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def compared(case: Case, quick: bool) -> tuple[list[list], list[dict[str, str]]]:
    """Rows and claims of one model."""
    params = case.net.init(jax.random.key(0), case.x)
    ours, first = Ours(case, params), case.name == "autoencoder"
    tuned = Tuned(case, params, ours)
    functions = {**ours.kinds(), **tuned.kinds(), "base": first_order(case, params)}
    t = interleaved(functions | (ours.outside() if first else {}), 3 if quick else 9)

    def ratios(times: dict[str, float]) -> list[float]:
        return [times[kind] / t["base"] for kind in KINDS]

    cost = mixed(t) / t["base"]
    rows: list[list] = [[case.name, "ours", t["base"] * 1e3, *ratios(t), cost, ours.compiling, ours.memory / 1e6]]
    own = {kind: t[f"tuned {kind}"] for kind in KINDS}
    rejected = int(tuned.state[0].core.motion.rejected)
    rows.append([case.name, f"ours, self-tuning ({rejected} taken back)", "", *ratios(own), mixed(own) / t["base"]])
    rows[-1] += [tuned.compiling, tuned.memory / 1e6]
    claims = []
    if first:
        outside, between = t["outside"] / t["base"], t["DLPack"] / t["base"]
        rows.append([case.name, "outside jit", "", outside, "", "", "", "", ""])
        rows.append([case.name, "DLPack and back alone", "", between, "", "", "", "", ""])
        claims.append(at_most(f"{case.name}: DLPack and back, x {case.base}", between, 0.3))
        claims.append(at_most(f"{case.name}: 10/100, x jitted {case.base}", cost, 2.2))
    found = rivals(case, params, quick)
    for mode, times in found.items():
        rows.append([case.name, f"kfac-jax {mode}", "", *ratios(times), mixed(times) / t["base"], times["first"], ""])
    for mode, times in (("fixed", t), ("adaptive", own)):
        over = mixed(times) / mixed(found[mode]) if mode in found else None
        claims.append(at_most(f"{case.name}: 10/100, x kfac-jax {mode}", over, 1.0))
    return rows, claims


def main() -> None:
    options = arguments(__doc__)
    rows, claims = ([], []) if options.quick else compiled_of_twelve()
    for case in cases(options.quick):
        more, found = compared(case, options.quick)
        rows += more
        claims += found
    columns = ("model", "optimiser", "base ms", "plain", "measured", "refreshed", "10/100", "compile s", "MB")
    finish("times the first-order step", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
