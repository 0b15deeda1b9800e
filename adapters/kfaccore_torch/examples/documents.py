"""Which training documents taught a small language model its answer? EK-FAC influence: lowest scores helped most."""

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

DOCUMENTS = ["the sky is blue.", "the grass is green.", "the snow is white.", "the coal is black.", "the sun is hot."]


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(128, width), nn.Linear(2 * width, width), nn.Linear(width, 128)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x, h = self.table(index), torch.zeros(len(index), self.table.embedding_dim)
        return self.head(torch.stack([h := torch.tanh(self.mix(torch.cat([z, h], 1))) for z in x.unbind(1)], 1)).mT


def main(steps: int = 150) -> list[str]:
    torch.manual_seed(0)
    text, model = torch.tensor([[ord(c) for c in d.ljust(20)] for d in DOCUMENTS]), Model()
    loss, data = nn.CrossEntropyLoss(), [(text[:, :-1], text[:, 1:])]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    asked = [(text[1:2, :13], text[1:2, 13])]  # "the grass is ", and "g"
    measure = lambda f, y: f[:, :, -1].log_softmax(1).gather(1, y[:, None])[:, 0]  # noqa: E731
    P = kf.Posterior(kt.matrices(model), kf.fit(kf.EKFAC(), kt.Stream(model, loss, data, draws=8)), 1e-3)
    queries = next(iter(kt.measured(model, measure, asked)))
    found = kf.scores(P, queries, kt.Stream(model, loss, data, fisher=kf.empirical))[0]
    return [DOCUMENTS[i] for i in sorted(range(len(DOCUMENTS)), key=lambda i: float(found[i]))]


if __name__ == "__main__":
    print(*main(), sep="\n")
