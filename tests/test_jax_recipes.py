"""What recipes rest on: graphs padded to a batch, derivatives of a network as predictions, leaves of one element."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_checks import close
from jax_needed import jax, jnp, kj
from kfaccore_jax.examples import packed_graphs, pinn


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def graphs(nodes, edges):
    """Three graphs of 2, 4 and 3 nodes, padded to `nodes` and `edges`."""
    sizes = np.array([2, 4, 3])
    senders = np.zeros((3, edges), int)
    receivers = np.zeros((3, edges), int)
    features = np.random.default_rng(5).normal(size=(3, nodes, 4))  # padding holds anything
    for i, size in enumerate(sizes):
        features[i, :size] = np.random.default_rng(i).normal(size=(size, 4))
        ends = np.random.default_rng(10 + i).integers(0, size, (2, 2 * size))
        senders[i, : 2 * size] = ends[0]
        receivers[i, : 2 * size] = ends[1]
    found = {"nodes": features, "senders": senders, "receivers": receivers}
    found |= {"node_mask": np.arange(nodes) < sizes[:, None], "edge_mask": np.arange(edges) < 2 * sizes[:, None]}
    return {name: jnp.asarray(x) for name, x in found.items()}


GRAPH_PARAMS = {"message": numbers(1, 4, 5), "update": numbers(2, 9, 6), "read": numbers(3, 6, 2)}


def masks(graph):
    return {"message": graph["edge_mask"], "update": graph["node_mask"]}


def test_rows_of_a_padded_graph_are_its_own():
    graph = graphs(5, 9)
    apply = jax.vmap(packed_graphs.net, (None, 0))
    plan = kj.plan(apply, GRAPH_PARAMS, graph, strict=True)
    draw = numbers(4, 1, 3, 2)

    @jax.jit
    def examples(params):
        records = kj.capture(plan, params, graph).records(draw, 3.0, mask=masks(graph))
        return {name: record.examples() for name, record in records.items()}

    found = examples(GRAPH_PARAMS)
    gradient = jax.jit(jax.grad(lambda params, one, draw: jnp.vdot(packed_graphs.net(params, one), draw)))
    for i in range(3):
        want = gradient(GRAPH_PARAMS, jax.tree.map(lambda x, i=i: x[i], graph), draw[0, i])
        J = {name: each[0, :, i] for name, each in found.items()}
        close(plan.tree(jax.tree.map(jnp.zeros_like, GRAPH_PARAMS), J), want)


def test_padding_of_graphs_changes_no_direction():
    found = []
    for nodes, edges in ((4, 8), (7, 13)):
        graph = graphs(nodes, edges)
        plan = kj.plan(jax.vmap(packed_graphs.net, (None, 0)), GRAPH_PARAMS, graph, strict=True)
        tx = kj.kfac(plan)

        @jax.jit
        def direction(params, graph, plan=plan, tx=tx):
            captured = kj.capture(plan, params, graph)
            records = captured.records(numbers(4, 1, 3, 2), 3.0, mask=masks(graph))
            return tx.update(captured.gradients(numbers(6, 3, 2)), tx.init(params), records=records)[0]

        found.append(direction(GRAPH_PARAMS, graph))
    close(*found)


def test_graphs_packed_end_to_end_are_refused():
    nodes = numbers(0, 6, 4)

    def packed(params, nodes):
        around = jnp.tanh(nodes @ params["message"])
        return around[jnp.arange(len(nodes))[::-1]] @ params["read"]

    params = {"message": numbers(1, 4, 5), "read": numbers(2, 5, 1)}
    with pytest.raises(ValueError, match=r"gather|rev"):
        kj.plan(packed, params, nodes, strict=True)


def test_rows_of_derivatives_are_those_of_each_point():
    params = {"w": numbers(1, 1, 4), "b": numbers(2, 4), "v": numbers(3, 4, 1), "c": numbers(4, 1)}
    x = jnp.abs(numbers(5, 3, 1))
    edge = jnp.asarray([[0.0], [1.0], [0.0]])
    plan = kj.plan(pinn.apply, params, x, edge, batched=(0, 1), strict=True)
    draws = {"inside": numbers(6, 1, 3, 1), "edge": numbers(7, 1, 3, 1)}
    records = kj.capture(plan, params, x, edge).records(draws, 3.0)

    def one(params, i):
        heads = pinn.apply(params, x[i : i + 1], edge[i : i + 1])
        return sum(jnp.vdot(heads[name], draws[name][0, i]) for name in heads)

    for i in range(3):
        J = {name: record.examples()[0, :, i] for name, record in records.items()}
        close(plan.tree(jax.tree.map(jnp.zeros_like, params), J), jax.grad(one)(params, i))


def test_draws_of_two_heads_need_no_labels():
    joint = kf.Joint({"policy": kf.SoftmaxCrossEntropy(), "value": kf.Gaussian()})
    f = {"policy": np.random.default_rng(1).normal(size=(5, 3)), "value": np.random.default_rng(2).normal(size=(5, 1))}
    noise = joint.noise(f, 2, np.random.default_rng(3))
    target = {"policy": np.array([0, 2, 1, 1, 0]), "value": np.zeros((5, 1))}
    for head, draws in kf.monte_carlo(joint, f, noise).items():
        np.testing.assert_array_equal(draws, kf.monte_carlo(joint, f, noise, target)[head])
    with pytest.raises(ValueError, match="class weights"):
        kf.SoftmaxCrossEntropy(weights=(1.0, 2.0, 1.0)).normaliser(f["policy"], None)
