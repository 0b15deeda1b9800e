"""A character transformer on text that ships with Python, trained by the optimizer that sets its own step."""

import pydoc_data.topics

import torch
from torch import nn

from kfaccore_torch import Optimizer


class Transformer(nn.Module):
    """Logits (batch, characters, positions) of the next character."""

    def __init__(self, characters: int, d: int = 64, layers: int = 2, positions: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, d), nn.Embedding(positions, d)
        block = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.blocks(self.token(x) + self.position(places), mask=mask, is_causal=True)
        return self.head(self.norm(h)).transpose(1, 2)


def text() -> tuple[torch.Tensor, int]:
    """Python's help topics as numbers, and how many characters there are."""
    found = "".join(pydoc_data.topics.topics.values())
    index = {c: i for i, c in enumerate(sorted(set(found)))}
    return torch.tensor([index[c] for c in found]), len(index)


def main(steps: int = 100) -> float:
    """Loss of the last batch, in nats a character."""
    torch.manual_seed(0)
    data, characters = text()
    model, loss = Transformer(characters), float("inf")
    optimizer = Optimizer(model, nn.CrossEntropyLoss())
    for _ in range(steps):
        starts = torch.randint(len(data) - 65, (16, 1))
        rows = data[starts + torch.arange(65)]
        loss = optimizer.step(rows[:, :-1], rows[:, 1:])
    return loss


if __name__ == "__main__":
    print(f"{main():.3f} nats a character")
