"""How much is asked of a batch of many small calls."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.owner import factors  # noqa: E402
from kfaccore_torch.question import Question  # noqa: E402
from kfaccore_torch.scaled import Asked  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")


class Cell(nn.Module):
    """A cell called step by step, with the words of all sentences one after the other."""

    def __init__(self):
        super().__init__()
        self.c, self.o = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        found = []
        for t in range(x.shape[1]):
            h = self.c(x[:, t], h)
            found.append(self.o(h))
        return torch.stack(found, 1).flatten(0, 1)


def test_examples_of_fewer_rows_are_asked_for_before_rows_are_taken_to_mix(monkeypatch):
    pulled = []
    pull = Question._pull
    monkeypatch.setattr(Question, "_pull", lambda self, *args: pulled.append(0) or pull(self, *args))
    torch.manual_seed(0)
    pre = kt.Preconditioner(Cell(), nn.CrossEntropyLoss())
    with pre.capture():
        f = pre.engine.model(torch.randn(4, 6, 3))
    pre.loss(f, torch.arange(24) % 3)
    assert not pre.engine.mixing
    assert len(pulled) == 3  # the draw, with each row and with each sentence scaled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_was_scaled_by_some_power(dtype):
    rng = torch.Generator().manual_seed(0)
    s = factors(20, dtype)[0]
    first = (torch.randn(9, 3, generator=rng) * 10.0 ** -torch.arange(0, 4.5, 0.5)[:, None]).to(dtype)
    first[4] = 0
    second = (first.double() * s[torch.arange(9) * 2][:, None]).to(dtype)
    before = Asked.of(first)
    assert before.powers(second, s) == [True]
    assert before.powers(-second, s) == [False]
    mixed = second.clone()
    mixed[0] = (0.6 * second[0].double() + 0.4 * first[0].double() * s[3] * torch.tensor([1.0, -1.0, 2.0])).to(dtype)
    assert before.powers(mixed, s) == [False]
    assert before.powers(second * 4 * float(s.max() / s.min()), s) == [False]
