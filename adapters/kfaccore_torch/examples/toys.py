"""What the loops of other libraries train on, made on the spot."""

import torch
from torch.utils.data import DataLoader, TensorDataset


def points(count: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane in two classes that no straight line parts."""
    torch.manual_seed(0)
    x = torch.randn(count, 2)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def loader(batch: int) -> DataLoader:
    """The points in batches."""
    return DataLoader(TensorDataset(*points()), batch_size=batch, shuffle=True)


def sentences(count: int = 256, length: int = 12, words: int = 24) -> list[dict[str, torch.Tensor]]:
    """Sentences in which each word fixes the next, but for one in five."""
    rule = torch.randperm(words)
    ids = [torch.randint(0, words, (count,))]
    for _ in range(length - 1):
        ids.append(torch.where(torch.rand(count) < 0.2, torch.randint(0, words, (count,)), rule[ids[-1]]))
    return [{"input_ids": x, "labels": x} for x in torch.stack(ids, 1)]
