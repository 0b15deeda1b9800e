"""Loops as people write them: the direction of one step is that of the exact blocks, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import torch_oracle as oracle

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
DAMPING = 0.1


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def batch():
    rng = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, generator=rng), torch.tensor([0, 1, 2, 1, 0])


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def wanted(model, x, y):
    """(F + damping)^-1 grad of every layer, F = J^T H J of the training loss."""
    found = {}
    grads = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    named = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
    for layer in kt.plan(model).layers.values():
        F = oracle.ggn(model, lambda f: CE(f, y), x, layer)[0]
        V = np.asarray(layer.matrix({role: named[path].numpy() for role, path in layer.paths.items()}))
        V = np.linalg.solve(F + DAMPING * np.eye(len(F)), V.reshape(-1)).reshape(V.shape)
        found |= {layer.paths[role]: torch.as_tensor(np.array(a)) for role, a in layer.arrays(V).items()}
    return found


def plainly(pre, model, x, y):
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()


def saved_on_the_cpu(pre, model, x, y):
    with torch.autograd.graph.save_on_cpu():
        plainly(pre, model, x, y)


def called_functionally(pre, model, x, y):
    plainly(pre, lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)), x, y)


def checkpointed(pre, model, x, y):
    plainly(pre, lambda x: model[2](checkpoint(model[:2], x, use_reentrant=False)), x, y)


def checkpointed_in_sequence(pre, model, x, y):
    plainly(pre, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False), x, y)


def in_two_forwards(pre, model, x, y):
    plainly(pre, lambda x: torch.cat([model(x[:2]), model(x[2:])]), x, y)


def an_empty_micro_batch_first(pre, model, x, y):
    with pre.capture():
        f = model(x[:0])
    pre.loss(f, y[:0]).nan_to_num().backward()
    plainly(pre, model, x, y)


def gradients_by_hand(pre, model, x, y):
    with pre.capture():
        f = model(x)
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(pre.loss(f, y), parameters), strict=True):
        p.grad = g


def a_loss_formed_by_the_model(pre, model, x, y):
    with pre.capture():
        f = model(x)
        value = CE(f, y)
    assert pre.attach(value, f, y) is value
    value.backward()


def under_hooks(pre, model, x, y):
    handles = [model[2].register_full_backward_hook(lambda *_: None), model[0].register_forward_hook(lambda *_: None)]
    plainly(pre, model, x, y)
    for handle in handles:
        handle.remove()


def a_penalty_of_the_input_gradient(pre, model, x, y):
    """A term without curvature whose gradient is nothing here: it is declared, and leaves the statistics alone."""
    x = x.clone().requires_grad_()
    with pre.capture():
        f = model(x)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    (pre.loss(f, y) + pre.extra(0.0 * slope.square().sum())).backward()


LOOPS = [plainly, saved_on_the_cpu, called_functionally, checkpointed, checkpointed_in_sequence, in_two_forwards]
LOOPS += [an_empty_micro_batch_first, gradients_by_hand, a_loss_formed_by_the_model]
LOOPS += [under_hooks, a_penalty_of_the_input_gradient]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_direction_is_that_of_the_exact_blocks(loop):
    model, (x, y) = mlp(), batch()
    core = kf.Preconditioner(kf.Exact(), kf.Clocks(1, 1), kf.Schedules(DAMPING, 0.9))
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
    loop(pre, model, x, y)
    pre.step()
    for name, direction in wanted(model, x, y).items():
        torch.testing.assert_close(model.get_parameter(name).grad, direction, rtol=1e-8, atol=1e-10)


class Changed(nn.Module):
    """What is done to a layer's output, or to the layer, in ways that a shell must see through."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.o = way, nn.Linear(3, 4), nn.Linear(4, 3)
        if way == "weight norm":
            nn.utils.parametrizations.weight_norm(self.a)
        elif way == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.a).eval()
        elif way == "hook":
            self.a.register_forward_hook(lambda module, inputs, output: 2 * output + 1)
        elif way == "hook before":
            self.o.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,))

    def forward(self, x):
        if self.way == "packed":
            words = x.unflatten(1, (3, 1)).expand(-1, -1, 3)
            packed = nn.utils.rnn.pack_padded_sequence(words, [3, 1, 2, 3, 2], True, False)
            rows = nn.utils.rnn.PackedSequence(torch.tanh(self.a(packed.data)), *packed[1:])
            return self.o(nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0].sum(1))
        if self.way == "filled":
            h = x.new_zeros(len(x), 4)
            for i in range(0, len(x), 2):
                h[i : i + 2] = torch.tanh(self.a(x[i : i + 2]))
            return self.o(h)
        if self.way == "siamese":
            both = torch.tanh(self.a(torch.stack([x, x.flip(1)])))
            return self.o((both[0] - both[1]).abs())
        h = self.a(x)
        if self.way == "in place":
            h[:, :2] = torch.tanh(h[:, 2:])
            h += 1
        if self.way == "not trained through":
            with torch.no_grad():
                more = self.a(x) * 0.1
            h = h + more
        return self.o(torch.tanh(h))


WAYS = ["weight norm", "spectral norm", "hook", "hook before", "packed", "filled", "siamese", "in place"]


@pytest.mark.parametrize("way", [*WAYS, "not trained through"])
def test_records_are_right_whatever_is_done_to_a_layer(way):
    model, (x, y) = Changed(way), batch()
    records, _ = kt.records(model, CE, x, y, fisher=kf.type2)
    layers = kt.plan(model).layers
    assert set(records) == set(layers)
    for name, layer in layers.items():
        oracle.close(kf.dense(records[name]), oracle.ggn(model, lambda f: CE(f, y), x, layer))
