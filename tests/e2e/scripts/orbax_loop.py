"""JAX with optax and Orbax's CheckpointManager, resumed from its latest step.

python orbax_loop.py OUT [STEPS] [PACE_S]
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

out = os.path.abspath(sys.argv[1])
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
pace_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.3

key = jax.random.key(3)
inputs = jax.random.normal(key, (96, 16))
targets = jnp.tanh(inputs.sum(axis=1))
params = {"inner": 0.1 * jax.random.normal(key, (16, 32)), "outer": jnp.zeros((32,))}
optimizer = optax.adam(1e-2)
state = {"params": params, "optimizer": optimizer.init(params)}


@jax.jit
def train_step(state, rows, goals):
    def loss_of(params):
        return jnp.mean((jnp.tanh(rows @ params["inner"]) @ params["outer"] - goals) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, inner = optimizer.update(gradients, state["optimizer"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": inner}, loss


manager = ocp.CheckpointManager(
    os.path.join(out, "ckpts"),
    options=ocp.CheckpointManagerOptions(max_to_keep=3, save_interval_steps=5),
)
step = manager.latest_step() or 0
if step:
    state = manager.restore(step, args=ocp.args.StandardRestore(state))
print("starting at step", step, flush=True)

while step < steps:
    at = 8 * step % 96
    state, loss = train_step(state, inputs[at : at + 8], targets[at : at + 8])
    step += 1
    manager.save(step, args=ocp.args.StandardSave(state))
    print("step", step, "loss", float(loss), flush=True)
    time.sleep(pace_s)

manager.wait_until_finished()
np.savez(os.path.join(out, "weights.npz"), **{k: np.asarray(v) for k, v in state["params"].items()})
