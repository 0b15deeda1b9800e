"""A small sequential network on the Array API (NumPy, CuPy): captures what kfaccore needs and trains with it."""

from kfaccore_numpy.activations import GELU, ReLU, Sigmoid, Tanh
from kfaccore_numpy.baselines import SGD, Adam
from kfaccore_numpy.conv import AvgPool, Conv2d, MaxPool
from kfaccore_numpy.dense import Dense, Flatten
from kfaccore_numpy.network import Residual, Sequential, Tape
from kfaccore_numpy.online import Online, Tuned
from kfaccore_numpy.records import save_records
from kfaccore_numpy.stream import Stream, margin, measured, outputs
from kfaccore_numpy.tasks import TASKS, Task
from kfaccore_numpy.train import Progress, fit, initial_state, mean_loss, sampled, step, true_labels

__all__ = [
    "GELU",
    "SGD",
    "TASKS",
    "Adam",
    "AvgPool",
    "Conv2d",
    "Dense",
    "Flatten",
    "MaxPool",
    "Online",
    "Progress",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Stream",
    "Tanh",
    "Tape",
    "Task",
    "Tuned",
    "fit",
    "initial_state",
    "margin",
    "mean_loss",
    "measured",
    "outputs",
    "sampled",
    "save_records",
    "step",
    "true_labels",
]
