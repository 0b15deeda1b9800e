"""Differential equations: problems with known solutions, networks that solve them, and their training on NumPy arrays.

`problems` has equations, samplers and errors; `taylor` carries derivatives through a network as shared positions, with
the activations of `smooth`; `network` makes loss, gradients and records of them; `train` trains, `tasks` has the tuned
numbers of every method.
"""
