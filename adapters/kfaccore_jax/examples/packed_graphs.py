"""Message passing on graphs of different sizes: padded to a batch of graphs, so that a row belongs to its graph.

A batch packed end to end (jraph's GraphsTuple) moves nodes along the axis that holds the examples, which the plan
refuses. Padded, the axis in front is the graph, and masks say which nodes and edges exist.
"""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def net(params, graph):
    """One graph: nodes (nodes, 4), senders and receivers (edges,), masks of both; the mean over nodes."""
    real = graph["edge_mask"][:, None]
    messages = jnp.tanh(graph["nodes"][graph["senders"]] @ params["message"]) * real
    got = jax.ops.segment_sum(messages, graph["receivers"], len(graph["nodes"]))
    hidden = jnp.tanh(jnp.concatenate([graph["nodes"], got], 1) @ params["update"]) * graph["node_mask"][:, None]
    return hidden.sum(0) / graph["node_mask"].sum() @ params["read"]


def main(steps: int = 60, graphs: int = 32, nodes: int = 6, edges: int = 10) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 8)
    sizes = jax.random.randint(keys[0], (graphs, 1), 2, nodes + 1)
    ends = jax.random.randint(keys[1], (2, graphs, edges), 0, 1000) % sizes
    graph = {"nodes": jax.random.normal(keys[2], (graphs, nodes, 4)), "senders": ends[0], "receivers": ends[1]}
    graph |= {"node_mask": jnp.arange(nodes) < sizes, "edge_mask": jnp.arange(edges) < 2 * sizes}
    shapes = {"message": (4, 8), "update": (12, 8), "read": (8, 1)}
    params = {n: jax.random.normal(k, s) / s[0] ** 0.5 for k, (n, s) in zip(keys[3:], shapes.items(), strict=False)}
    y = jnp.cos(graph["nodes"][:, 0, :1])
    loss = kf.Gaussian()
    plan = kj.plan(jax.vmap(net, (None, 0)), params, graph, strict=True)
    tx = optax.chain(kj.kfac(plan, schedules=kf.Schedules(damping=0.01)), optax.sgd(0.3))
    masks = {"message": graph["edge_mask"], "update": graph["node_mask"]}

    @jax.jit
    def step(params, state, key):
        captured = kj.capture(plan, params, graph)
        f = captured.prediction
        draws = kf.monte_carlo(loss, f, jax.random.normal(key, (1, *f.shape)))
        records = captured.records(draws, graphs, mask=masks)
        updates, state = tx.update(captured.gradients((f - y) / graphs), state, params, records=records)
        return optax.apply_updates(params, updates), state, loss.value(f, y) / graphs

    state = tx.init(params)
    losses = []
    for key in jax.random.split(keys[7], steps):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    print("loss", *main()[::20])
