"""What step() wrote is no gradient: a pass that adds to it, and a step that takes it again, are named."""

from __future__ import annotations

import copy
import warnings

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.utils.weak import TensorWeakRef  # noqa: E402

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")
X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 3


class Loop:
    def __init__(self, clocks=(1, 1)):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.trunk = torch.optim.SGD(self.model[0].parameters(), 0.05)
        self.head = torch.optim.SGD(self.model[2].parameters(), 0.05)
        self.pre = kt.Preconditioner(self.model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(*clocks), donate=True))

    def backward(self):
        with self.pre.capture():
            f = self.model(X)
        self.pre.loss(f, Y).backward()

    def both(self, what):
        for optimizer in (self.trunk, self.head):
            getattr(optimizer, what)()


def said(run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in told if "directions that step() wrote" in str(w.message)]


def skipped(loop):  # as under accelerate, whose optimizer steps and zeroes every fourth time
    for step in range(8):
        loop.backward()
        loop.pre.step()
        if step % 4 == 3:
            loop.both("step")
            loop.both("zero_grad")


def never(loop):
    for _ in range(4):
        loop.backward()
        loop.pre.step()
        loop.both("step")


def clipped(loop):
    for _ in range(4):
        loop.backward()
        loop.pre.step()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-2)
        loop.both("step")


def seldom(loop):
    for step in range(6):
        loop.backward()
        loop.pre.step()
        loop.head.step()
        loop.head.zero_grad()
        if step % 3 == 2:
            loop.trunk.step()
            loop.trunk.zero_grad()


@pytest.mark.parametrize("clocks", [(1, 1), (10, 10)], ids=["due", "rarely due"])
@pytest.mark.parametrize("run", [skipped, never, clipped, seldom])
def test_a_pass_that_adds_to_directions_is_named_once(run, clocks):
    loop = Loop(clocks)
    found = said(lambda: run(loop))
    assert len(found) == 1
    assert ("'2.weight'" in found[0]) == (run is not seldom)
    assert "'0.weight'" in found[0]


def in_place(loop):
    loop.trunk.zero_grad(set_to_none=False)
    loop.head.zero_grad(set_to_none=False)


def by_data(loop):
    for p in loop.model.parameters():
        p.grad.data.zero_()


def replaced(loop):
    for p in loop.model.parameters():
        p.grad = torch.zeros_like(p)


ZEROED = {"none": lambda loop: loop.both("zero_grad"), "in place": in_place, "data": by_data, "replaced": replaced}


@pytest.mark.parametrize("zero", ZEROED)
@pytest.mark.parametrize("clocks", [(1, 1), (10, 10)], ids=["due", "rarely due"])
def test_loops_that_zero_are_told_nothing(zero, clocks):
    loop = Loop(clocks)

    def run():
        for step in range(6):
            loop.backward()
            loop.backward()  # another micro-batch
            loop.pre.step()
            if step % 2:
                nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-2)
            loop.both("step")
            ZEROED[zero](loop)

    assert not said(run)


def test_gradients_that_are_written_past_autograd_are_gradients():
    """Buffers as of a recorded graph: the same tensors, the same versions, other numbers."""
    loop = Loop((10, 10))

    def run():
        for _ in range(4):
            loop.both("zero_grad")
            loop.backward()
            found = [p.grad.clone() for p in loop.model.parameters()]
            loop.pre.step()
            for p, g in zip(loop.model.parameters(), found, strict=True):
                p.grad.data.copy_(g)
            loop.pre.step()

    assert not said(run)


@pytest.mark.parametrize("clocks", [(1, 1), (10, 10)], ids=["due", "rarely due"])
def test_a_second_step_is_refused(clocks):
    loop = Loop(clocks)
    for _ in range(2):
        loop.both("zero_grad")
        loop.backward()
        loop.pre.step()
    found = [p.grad.clone() for p in loop.model.parameters()]
    with pytest.raises(ValueError, match="on the directions that it wrote itself"):
        loop.pre.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(loop.model.parameters(), found, strict=True))
    loop.both("zero_grad")
    loop.backward()
    loop.pre.step()


def test_a_step_on_the_directions_of_some_is_named():
    loop = Loop((10, 10))
    loop.backward()
    loop.pre.step()
    loop.head.zero_grad()

    def run():
        with loop.pre.capture():
            f = loop.model[2](loop.model[:2](X).detach())
        loop.pre.loss(f, Y).backward()
        loop.pre.step()

    (found,) = said(run)
    assert "takes them for gradients again" in found
    assert "'0.weight'" in found
    assert "'2.weight'" not in found


def test_a_copy_knows_of_no_tensors():
    loop = Loop()
    loop.backward()
    loop.pre.step()
    other = copy.deepcopy(loop.pre)
    assert other._written._left == []


def test_directions_that_a_loop_lets_go_of_are_gone():
    """Else they would lie beside the activations of the next forward."""
    loop = Loop()
    loop.backward()
    loop.pre.step()
    left = [TensorWeakRef(p.grad) for p in loop.model.parameters()]
    loop.both("zero_grad")
    assert [ref() for ref in left] == [None] * 4


class Shared:
    """Two heads on one trunk, a Preconditioner each."""

    def __init__(self):
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.heads = [nn.Sequential(self.trunk, nn.Linear(5, 3)) for _ in range(2)]
        self.pres = [kt.Preconditioner(head, CE, kf.Preconditioner(kf.KFAC(), donate=True)) for head in self.heads]

    def zero(self):
        for head in self.heads:
            head.zero_grad()

    def backward(self, i):
        with self.pres[i].capture():
            f = self.heads[i](X)
        self.pres[i].loss(f, Y).backward()


def at_once(shared):
    shared.backward(0)
    shared.backward(1)
    shared.pres[0].step()
    shared.pres[1].step()


def added(shared):
    shared.backward(0)
    shared.pres[0].step()
    shared.backward(1)
    shared.pres[1].step()


@pytest.mark.parametrize("loop", [at_once, added])
def test_directions_of_another_preconditioner_are_named(loop):
    shared = Shared()
    (told,) = said(lambda: loop(shared))
    assert "0.0.weight" in told
    assert "make one over all that share it" in told


def test_a_step_on_nothing_but_the_directions_of_another_is_refused():
    shared = Shared()
    other = kt.Preconditioner(shared.heads[0], CE, kf.Preconditioner(kf.KFAC()))
    shared.backward(0)
    with other.capture():
        f = shared.heads[0](X)
    other.loss(f, Y)
    shared.pres[0].step()
    with pytest.raises(ValueError, match="another Preconditioner wrote"):
        other.step()


def test_preconditioners_in_turn_are_told_nothing():
    shared = Shared()

    def run():
        for i in (0, 1, 0, 1):
            shared.backward(i)
            shared.pres[i].step()
            shared.zero()

    assert not said(run)


def test_a_pass_through_what_another_has_moved_is_none_of_its_own():
    """A generator's loss adds to the gradients of its discriminator, which the discriminator's next step zeroes."""
    torch.manual_seed(1)
    make, judge = nn.Linear(3, 3), nn.Linear(3, 3)
    pres = [kt.Preconditioner(part, CE, kf.Preconditioner(kf.KFAC())) for part in (make, judge)]

    def run():
        for _ in range(3):
            judge.zero_grad()
            with pres[1].capture():
                f = judge(make(X).detach())
            pres[1].loss(f, Y).backward()
            pres[1].step()
            make.zero_grad()
            with pres[0].capture():
                f = judge(make(X))
            pres[0].loss(f, Y).backward()
            pres[0].step()

    assert not said(run)


def test_gradients_along_the_last_direction_are_gradients():
    """One example again and again, zeroed in place: every gradient of the layer has the direction of the last step."""
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    pre = kt.Preconditioner(model, nn.MSELoss(), kf.Preconditioner(kf.KFAC()))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def run():
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            with pre.capture():
                f = model(X[:1])
            pre.loss(f, torch.ones(1, 1)).backward()
            pre.step()
            optimizer.step()

    run()


@pytest.mark.parametrize("zero", ZEROED)
def test_an_attack_whose_gradients_are_thrown_away_is_told_nothing(zero):
    """Its passes add to what the last step wrote, which is zeroed before the training loss."""
    loop = Loop()

    def run():
        for _ in range(5):
            attacked = X.clone().requires_grad_()
            for _ in range(2):
                with loop.pre.capture():
                    f = loop.model(attacked)
                loop.pre.loss(f, Y).backward()
                attacked.data += 0.1 * attacked.grad.sign()
            ZEROED[zero](loop)
            loop.backward()
            loop.pre.step()
            loop.both("step")

    assert not said(run)
