"""K-FAC in an own TensorFlow loop: a small transformer finds the token that a sequence holds most often."""

import keras
import numpy as np

import kfaccore as kf
from kfaccore_tensorflow import Optimizer

L = keras.layers


def transformer(tokens: int = 5, length: int = 9, width: int = 16) -> keras.Model:
    """One block of attention over embedded tokens."""
    ids = keras.Input((length,), dtype="int32")
    x = L.Embedding(tokens, width)(ids)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, width // 2)(x, x))
    x = L.GlobalAveragePooling1D()(L.EinsumDense("...x,xy->...y", width, activation="gelu", bias_axes="y")(x))
    return keras.Model(ids, L.Dense(tokens)(x))


def main(steps: int = 60, batch: int = 64) -> list[float]:
    """Losses of all steps."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    optimizer = Optimizer(transformer(), kf.SoftmaxCrossEntropy(), method=kf.EKFAC())  # the step tunes itself
    losses = []
    for _ in range(steps):
        x = rng.integers(0, 5, (batch, 9))
        y = np.array([np.bincount(row).argmax() for row in x])
        losses.append(float(optimizer.step(x, y)))
    print(f"loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}; codes {optimizer.info.counts()}")
    return losses


if __name__ == "__main__":
    main()
