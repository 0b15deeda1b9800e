"""A Llama-like model whose loss is of shifted logits, flattened as language models are usually written, or not."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402


class Block(nn.Module):
    """Causal attention with rotary positions and a gated MLP."""

    def __init__(self, d):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((d, 2 * d), (d, 2 * d), (2 * d, d)))

    def forward(self, x):
        batch, length, d = x.shape
        angle = torch.arange(length)[:, None] / 100 ** (torch.arange(0, d // 2, 2) / (d // 2))
        turn = torch.polar(torch.ones_like(angle), angle)
        h = self.n1(x)
        q, k, v = (w(h).reshape(batch, length, 2, d // 2).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for z in (q, k)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    def __init__(self, flat, seed, vocabulary=32, d=32):
        super().__init__()
        torch.manual_seed(seed)
        self.flat, self.table = flat, nn.Embedding(vocabulary, d)
        self.blocks = nn.Sequential(Block(d), Block(d))
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids):
        logits = self.head(self.norm(self.blocks(self.table(ids))))[:, :-1]
        return logits.reshape(-1, logits.shape[-1]) if self.flat else logits.transpose(1, 2)


def trained(flat, seed, steps=40):
    rng = torch.Generator().manual_seed(seed)
    rule = torch.randint(0, 32, (32,), generator=rng)
    model, losses = Language(flat, seed), []
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss())
    for _ in range(steps):
        ids = [torch.randint(0, 32, (16,), generator=rng)]
        for _ in range(11):
            noise = torch.rand(16, generator=rng) < 0.2
            ids.append(torch.where(noise, torch.randint(0, 32, (16,), generator=rng), rule[ids[-1]]))
        x = torch.stack(ids, 1)
        losses.append(optimizer.step(x, x[:, 1:].reshape(-1) if flat else x[:, 1:]))
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_flattened_logits_train_like_the_others_to_the_bit(seed):
    """Forty steps in single precision, where rounding grows to per cents: the same noise, rows, products and sums in
    one order."""
    plain, flat = trained(False, seed), trained(True, seed)
    assert flat == plain
    assert plain[-1] < 0.6 * plain[0]


def test_their_records_are_the_same():
    x = torch.randint(0, 32, (4, 6))
    found = [
        kt.records(Language(flat, 0), nn.CrossEntropyLoss(), x, x[:, 1:].reshape(-1) if flat else x[:, 1:], draws=2)[0]
        for flat in (False, True)
    ]
    for name, record in found[0].items():
        assert (record.batch, record.n) == (4, 20)
        torch.testing.assert_close(torch.tensor(found[1][name].g), torch.tensor(record.g), rtol=0, atol=0)
    assert kf.concat(*(f["head"] for f in found)).batch == 8
