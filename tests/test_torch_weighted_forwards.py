"""One loss of several weighted parts is one F, whichever parts share a forward; a weight of 0 adds nothing."""

from __future__ import annotations

import warnings

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Loop:
    """A small net with a second head, and its directions."""

    def __init__(self, method=None, loss=CE, fisher=kf.type2, refresh=1):
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        self.model = nn.ModuleList([self.trunk, self.one, self.two])
        core = kf.Preconditioner(method or kf.KFAC(), kf.Clocks(1, refresh), kf.Schedules(1e-2, 0.0))
        self.pre = kt.Preconditioner(self.model, loss, core, fisher=fisher)

    def forward(self, x):
        with self.pre.capture():
            return self.one(self.trunk(x))

    def directions(self):
        self.pre.step()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def data(n=12):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def cut(sizes, weights, together, each=False, **how):
    """Directions of the sum of weights times means over parts of a batch."""
    loop = Loop(**how)
    x, y = data(sum(sizes))
    parts = list(zip(x.split(sizes), y.split(sizes), weights, strict=True))
    if together:
        whole = loop.forward(x).split(sizes)
    losses = []
    for i, (part, labels, weight) in enumerate(parts):
        losses.append(loop.pre.loss(whole[i] if together else loop.forward(part), labels, weight=weight))
        if each:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    return loop.directions()


CUTS = {
    "halves": ([6, 6], [0.5, 0.5]),
    "uneven weights": ([6, 6], [0.7, 0.3]),
    "uneven sizes": ([3, 9], [0.25, 0.75]),
    "with one that has none": ([4, 8], [1.0, 0.5]),
    "none at the end": ([4, 8], [0.5, 1.0]),
    "more than one": ([4, 8], [1.0, 7.0]),
    "three": ([6, 2, 4], [0.2, 1.0, 1.5]),
    "quarters": ([3, 3, 3, 3], [0.25] * 4),
    "an empty one": ([4, 8], [0.6, 0.0]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", [kf.KFAC(), kf.Exact(), kf.EKFAC()], ids=["KFAC", "Exact", "EKFAC"])
@pytest.mark.parametrize("each", [False, True], ids=["one pass", "passes"])
@pytest.mark.parametrize("name", CUTS)
def test_forwards_add_as_the_parts_of_one(name, each, method):
    sizes, weights = CUTS[name]
    if 0.0 in weights:  # its rows are in A on one forward
        method = kf.Exact()
    wanted = cut(sizes, weights, True, method=method)
    torch.testing.assert_close(cut(sizes, weights, False, each=each, method=method), wanted, rtol=1e-9, atol=1e-12)


def test_sums_add_as_the_parts_of_one():
    how = {"method": kf.Exact(), "loss": nn.CrossEntropyLoss(reduction="sum")}
    wanted = cut([4, 8], [0.5, 2.0], True, **how)
    torch.testing.assert_close(cut([4, 8], [0.5, 2.0], False, **how), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_factor_of_micro_batches_divides_their_curvature(scaled):
    """Two forwards, weighted, of each of two micro-batches that are divided by their number; under a scaler too."""
    wanted = cut([6, 6], [0.7, 0.3], True, method=kf.Exact())
    loop, (x, y) = Loop(kf.Exact()), data()
    scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
    for k in range(2):
        one, two = x[3 * k :][:3], x[6 + 3 * k :][:3]
        f = loop.forward(one)
        g = loop.forward(two)
        loss = loop.pre.loss(f, y[3 * k :][:3], weight=0.7) + loop.pre.loss(g, y[6 + 3 * k :][:3], weight=0.3)
        scaler.scale(loss / 2).backward()
    if scaled:
        optimizer = torch.optim.SGD(loop.model.parameters(), 0.1)
        scaler.unscale_(optimizer)
    torch.testing.assert_close(loop.directions(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.4)], ids=["mixed labels", "a second loss"])
def test_micro_batches_of_whole_losses_are_the_batch(weights):
    """F is the mean over micro-batches, as that of the batch is, where each has all parts of the loss."""
    found = []
    for sizes in ([12], [6, 6], [4, 4, 4]):
        loop, (x, y) = Loop(kf.Exact()), data()
        for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            f = loop.forward(part)
            losses = (loop.pre.loss(f, z, weight=w) for z, w in zip((labels, 2 - labels), weights, strict=True))
            (sum(losses) / len(sizes)).backward()
        found.append(loop.directions())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_mean_of_weighted_forwards_in_one_pass_is_named(scaled):
    """Whose curvatures are their sum; weights that say so, and passes apart, are the mean."""
    found = []
    for way in ("mean", "weights", "passes"):
        loop, (x, y) = Loop(kf.Exact()), data()
        scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
        share = 0.25 if way == "weights" else 1.0
        losses = []
        for part, labels in zip(x.split(3), y.split(3), strict=True):
            f = loop.forward(part)
            losses.append(sum(loop.pre.loss(f, z, weight=w * share) for z, w in ((labels, 0.5), (2 - labels, 0.3))))
            if way == "passes":
                scaler.scale(losses.pop() / 4).backward()
        if losses:
            scaler.scale(sum(losses) / (4 if way == "mean" else 1)).backward()
        if scaled:
            scaler.unscale_(torch.optim.SGD(loop.model.parameters(), 0.1))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found.append(loop.directions())
        assert ["multiplied by 0.25" in str(w.message) for w in told] == [True] * (way == "mean")
    torch.testing.assert_close(found[1], found[2], rtol=1e-9, atol=1e-12)


def test_forwards_that_came_before_a_weight_are_named():
    """Two of different n without a weight: they had been taken for micro-batches."""
    loop, (x, y) = Loop(), data()
    losses = [loop.pre.loss(loop.forward(x[s]), y[s]) for s in (slice(0, 3), slice(3, 8))]
    losses.append(loop.pre.loss(loop.forward(x[8:]), y[8:], weight=0.5))
    sum(losses).backward()
    with pytest.warns(UserWarning, match=r"curvatures count by \[3.0, 5.0, 3.0\]"):
        loop.pre.step()


@pytest.mark.parametrize("share", [0.0, 1.0, torch.tensor(0.0), torch.tensor(0.0, requires_grad=True)])
def test_a_loss_of_weight_0_adds_nothing(share):
    found = []
    for mixed in (True, False):
        loop, (x, y) = Loop(), data()
        f = loop.forward(x)
        if mixed:
            loss = loop.pre.loss(f, y, weight=share) + loop.pre.loss(f, 2 - y, weight=1 - share)
        else:
            loss = loop.pre.loss(f, y if share == 1 else 2 - y)
        loss.backward()
        found.append(loop.directions())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_ramp_that_begins_at_0():
    """The second head has a gradient of zero then, and no statistics."""
    loop, (x, y) = Loop(refresh=2), data()
    for step in range(4):
        loop.model.zero_grad()
        with loop.pre.capture():
            h = loop.trunk(x)
            f, g = loop.one(h), loop.two(h)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (loop.pre.loss(f, y) + loop.pre.loss(g, 2 - y, weight=max(0, step - 1) / 10)).backward()
            loop.pre.step()
        assert bool(loop.two.weight.grad.any()) == (step > 1)
        assert bool(loop.one.weight.grad.isfinite().all())


def test_a_step_of_weight_0_alone_says_so():
    loop, (x, y) = Loop(), data()
    loop.pre.loss(loop.forward(x), y, weight=0).backward()
    with pytest.raises(ValueError, match="weight 0"):
        loop.pre.step()


@pytest.mark.parametrize(
    ("weight", "words"),
    [(-0.5, "not negative"), (float("nan"), "not negative"), (torch.ones(12), r"shape \(12,\).*ExampleLoss")],
)
def test_weights_that_are_none(weight, words):
    loop, (x, y) = Loop(), data()
    with pytest.raises(ValueError, match=words):
        loop.pre.loss(loop.forward(x), y, weight=weight)


def test_a_compiled_loss_is_the_loss():
    compiled = torch.compile(nn.CrossEntropyLoss(), backend="eager")
    found = []
    for loss in (compiled, CE):
        loop, (x, y) = Loop(loss=loss), data()
        assert type(loop.pre.engine.objective.loss) is nn.CrossEntropyLoss
        loop.pre.loss(loop.forward(x), y).backward()
        found.append(loop.directions())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_weight_scales_draws_and_forward_only_takes_none():
    model = nn.Linear(3, 3)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC()), fisher=kf.forward_only)
    with pre.capture():
        f = model(torch.ones(4, 3))
    with pytest.raises(ValueError, match="forward_only takes none: multiply the loss instead"):
        pre.loss(f, torch.arange(4) % 3, weight=0.5)


def told(loop):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loop.pre.step()
    return [str(w.message) for w in said]


def views(loop, together):
    """Two views, as of R-Drop or SimSiam: the mean of their losses."""
    x, y = data()
    with loop.pre.capture():
        if together:
            f, g = loop.one(loop.trunk(torch.cat([x, x + 1]))).chunk(2)
        else:
            f, g = loop.one(loop.trunk(x)), loop.one(loop.trunk(x + 1))
    return f, g, y


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two calls"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_of_losses_of_one_forward_is_named_once(scaled, together):
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
    found = []
    for _ in range(2):
        loop.model.zero_grad()
        f, g, y = views(loop, together)
        scaler.scale((loop.pre.loss(f, y) + loop.pre.loss(g, y)) / 2).backward()
        found += told(loop)
    assert len(found) == 1
    assert "multiplied by 0.5" in found[0]
    assert "weight=0.5" in found[0]


def test_the_mean_of_the_losses_of_time_steps_is_named():
    loop, (x, y) = Loop(), data()
    with loop.pre.capture():
        steps = [loop.one(loop.trunk(x + t)) for t in range(4)]
    (sum(loop.pre.loss(f, y) for f in steps) / 4).backward()
    assert any("the 4 losses of one forward were all multiplied by 0.25" in one for one in told(loop))


def whole(loop):
    f, g, y = views(loop, False)
    return loop.pre.loss(f, y, weight=0.5) + loop.pre.loss(g, y, weight=0.5)


def added(loop):
    f, g, y = views(loop, False)
    return loop.pre.loss(f, y) + loop.pre.loss(g, y)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("loss", [whole, added])
def test_accumulation_of_several_losses_is_told_nothing(loss, scaled):
    """Nor is its end, of fewer micro-batches, which are divided by the number of the others all the same."""
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
    for count in (4, 4, 2, 1, 4, 3):
        loop.model.zero_grad()
        for _ in range(count):
            scaler.scale(loss(loop) / 4).backward()
        assert not told(loop)


SUM = nn.CrossEntropyLoss(reduction="sum")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_sum_that_is_divided_past_the_loss_is_named(parts, scaled):
    """By the number of all labels, say; a weight is known."""
    found, said = [], []
    for way in ("mean", "weight", "divided"):
        loop, (x, y) = Loop(kf.Exact(), CE if way == "mean" else SUM), data()
        scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
        for part, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = loop.pre.loss(loop.forward(part), labels, weight=1 / 12 if way == "weight" else 1.0)
            scaler.scale(loss / {"mean": parts, "weight": 1, "divided": 12}[way]).backward()
        if scaled:
            scaler.unscale_(torch.optim.SGD(loop.model.parameters(), 0.1))
        said.append(told(loop))
        found.append({name: p.grad for name, p in loop.model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert said[:2] == [[], []]
    assert ["the loss, which is a sum, was multiplied by 0.08333" in one for one in said[2]] == [True]


@pytest.mark.parametrize("weight", [0.3, 10.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_weight_past_a_mean_loss_is_named_once(forwards, scaled, weight):
    """Beside another term, as in 0.3 loss + term; given as a weight it weighs F too, and a loss formed elsewhere is
    told nothing: then F is that of the loss without it."""
    found, said = [], []
    for way in ("weight", "factor", "attach"):
        loop, (x, y) = Loop(kf.Exact()), data()
        scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
        said.append([])
        for _ in range(2):
            loop.model.zero_grad()
            loss = loop.pre.extra(0.1 * loop.one.weight.square().sum())
            for part, labels in zip(x.chunk(forwards), y.chunk(forwards), strict=True):
                f = loop.forward(part)
                if way == "attach":
                    loss = loss + loop.pre.attach(weight * CE(f, labels), f, labels)
                else:
                    one = loop.pre.loss(f, labels, weight=weight if way == "weight" else 1.0)
                    loss = loss + (weight if way == "factor" else 1.0) * one
            scaler.scale(loss).backward()
            if scaled:
                scaler.unscale_(torch.optim.SGD(loop.model.parameters(), 0.1))
            said[-1] += told(loop)
            scaler.update()
        found.append(torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None]))
    assert [len(one) for one in said] == [0, 1, 0]
    assert f"the loss was multiplied by {weight:.4g}" in said[1][0]
    assert f"F is too {'large' if weight < 1 else 'small'}" in said[1][0]
    assert f"weight={weight:.4g}" in said[1][0]
    torch.testing.assert_close(found[1], found[2], rtol=1e-9, atol=1e-12)
    assert float((found[0] - found[1]).abs().max()) > 0.1 * float(found[0].abs().max())


def test_a_part_beside_one_that_was_thrown_away_is_told_nothing():
    loop, (x, y) = Loop(), data()
    for _ in range(2):
        loop.model.zero_grad()
        (loop.pre.loss(loop.forward(x), y) / 2).backward()
    assert not told(loop)


def test_a_scaler_of_ones_own_is_told_nothing():
    """It looks at the gradients before the step."""
    loop, (x, y) = Loop(), data()
    (1024 * loop.pre.loss(loop.forward(x), y)).backward()
    torch._foreach_div_([p.grad for p in loop.model.parameters() if p.grad is not None], 1024.0)
    assert not told(loop)


def test_parts_of_a_mean_over_forwards_are_told_nothing():
    """The end of an epoch has fewer."""
    loop, (x, y) = Loop(), data()
    for count in (4, 4, 2, 1, 4, 3, 1, 1):
        loop.model.zero_grad()
        for _ in range(count):
            (loop.pre.loss(loop.forward(x), y) / 4).backward()
        assert not told(loop)


def test_where_no_draw_is_taken_a_factor_is_told_nothing():
    """No weight could scale it."""
    loop, (x, y) = Loop(fisher=kf.forward_only), data()
    (0.5 * loop.pre.loss(loop.forward(x), y)).backward()
    assert not told(loop)


def test_a_factor_past_weighted_forwards_in_one_pass_is_named():
    """Of one loss each: their curvatures are added up by the weights alone."""
    loop, (x, y) = Loop(), data()
    loss = loop.pre.loss(loop.forward(x), y, weight=0.3) + loop.pre.loss(loop.forward(x + 1), y, weight=0.4)
    (0.5 * loss).backward()
    (one,) = told(loop)
    assert "multiplied by 0.5" in one
    assert "weight=0.5 * weight" in one


@pytest.mark.parametrize("factor", [1.0, 2.0, 1 / 3])
def test_sums_as_they_are_times_the_ranks_or_accumulated_are_told_nothing(factor):
    loop, (x, y) = Loop(loss=SUM), data()
    for _ in range(3):
        loop.model.zero_grad()
        for _ in range(3):
            (factor * loop.pre.loss(loop.forward(x), y)).backward()
        assert not told(loop)


def test_a_micro_batch_without_labels_is_a_part_of_the_mean():
    """Its losses have no share, and were divided by the number of all."""
    loop, (x, y) = Loop(), data()
    for labels in (y, torch.full_like(y, -100), y):
        with loop.pre.capture():
            f, g = loop.one(loop.trunk(x)), loop.one(loop.trunk(x + 1))
        ((loop.pre.loss(f, labels) + loop.pre.loss(g, labels)).nan_to_num() / 3).backward()
    assert not told(loop)


@pytest.mark.parametrize("scaled", [False, True])
def test_losses_as_they_are_are_told_nothing(scaled):
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", 256.0, enabled=scaled)
    for count in (1, 2, 1):
        loop.model.zero_grad()
        for _ in range(count):
            scaler.scale(added(loop)).backward()
        assert not told(loop)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", [kf.KFAC(), kf.Exact(), kf.EKFAC()], ids=["KFAC", "Exact", "EKFAC"])
@pytest.mark.parametrize("each", [False, True], ids=["one pass", "passes"])
def test_networks_without_a_common_layer_have_micro_batches_of_their_own(each, method):
    """Two discriminators, a forward each, in the order of their losses or in turns, as in one forward of both."""
    found = []
    for order in ((0, 1, 0, 1), (0, 0, 1, 1), None):
        torch.manual_seed(1)
        model = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2)])
        core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-2, 0.0))
        pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
        (x, y), losses = data(), []
        if order is None:
            for half in (slice(0, 6), slice(6, 12)):
                with pre.capture():
                    f = [net(x[half]) for net in model]
                losses.append(sum(pre.loss(one, y[half]) for one in f))
        else:
            seen = [0, 0]
            for i in order:
                half = slice(6 * seen[i], 6 * seen[i] + 6)
                seen[i] += 1
                with pre.capture():
                    f = model[i](x[half])
                losses.append(pre.loss(f, y[half]))
        for one in losses if each else [sum(losses)]:
            one.backward()
        pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-9, atol=1e-12)


def test_parts_of_a_mean_over_forwards_are_all_its_forwards():
    """Experts without a layer in common: each has J = 0 in the micro-batches of the other."""
    found = []
    for together in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        core = kf.Preconditioner(kf.Exact(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.0))
        pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
        x, y = data()
        halves = [(model[0], slice(0, 6)), (model[1], slice(6, 12))]
        if together:
            with pre.capture():
                f = torch.cat([net(x[half]) for net, half in halves])
            pre.loss(f, y).backward()
        else:
            for net, half in halves:
                with pre.capture():
                    f = net(x[half])
                (pre.loss(f, y[half]) / 2).backward()
        pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
