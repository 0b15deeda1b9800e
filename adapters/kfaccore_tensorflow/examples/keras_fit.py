"""K-FAC inside Keras `fit`: which of three spiral arms is a point on?"""

import keras
import numpy as np

import kfaccore as kf
from kfaccore_tensorflow import KFACModel, coverage


def spirals(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 2) and the arm of each."""
    rng = np.random.default_rng(seed)
    arm, t = rng.integers(0, 3, count), rng.uniform(0.2, 1, count)
    angle = 2 * np.pi * (arm / 3 + t) + rng.normal(0, 0.05, count)
    return (t * np.stack([np.cos(angle), np.sin(angle)])).T.astype("float32"), arm


def main(epochs: int = 8, count: int = 1500) -> float:
    """Accuracy on points not trained on."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((2,)), *(keras.layers.Dense(32, activation="tanh") for _ in range(2)), keras.layers.Dense(3)]
    net = keras.Sequential(layers)
    print(coverage(net))

    # The step sets rate, momentum and damping, and SGD(1.0) takes it as it is. With the default step, Fixed(), any
    # Keras optimizer applies the directions: its rate, momentum and clipping, and Schedules(damping=...), are yours.
    model = KFACModel(net, step=kf.SelfTuning())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss=loss, metrics=["accuracy"])
    model.fit(*spirals(count, 1), batch_size=100, epochs=epochs, verbose=0)
    accuracy = model.evaluate(*spirals(500, 2), verbose=0, return_dict=True)["accuracy"]
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
