"""Linear regression in numpy; its state is a pickle in the folder that it is given.

python numpy_pickle.py OUT [STEPS] [PACE_S]
"""

import os
import pickle
import sys
import time

import numpy as np

out = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
pace_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.3
os.makedirs(out, exist_ok=True)
state_file = os.path.join(out, "state.pkl")

rng = np.random.default_rng(11)
xs = rng.normal(size=(400, 16))
ys = xs @ rng.normal(size=16) + 0.1 * rng.normal(size=400)

if os.path.exists(state_file):
    with open(state_file, "rb") as file:
        state = pickle.load(file)  # noqa: S301  (its own file)
    print("loaded step", state["step"], flush=True)
else:
    state = {"step": 0, "weights": np.zeros(16), "rng": np.random.default_rng(12)}
    print("from scratch", flush=True)

while state["step"] < steps:
    rows = state["rng"].integers(0, 400, size=32)
    error = xs[rows] @ state["weights"] - ys[rows]
    state["weights"] -= 0.05 * xs[rows].T @ error / 32
    state["step"] += 1
    with open(state_file + ".new", "wb") as file:
        pickle.dump(state, file)
    os.replace(state_file + ".new", state_file)
    print("step", state["step"], "mse", float(np.mean(error**2)), flush=True)
    time.sleep(pace_s)

np.save(os.path.join(out, "weights.npy"), state["weights"])
print("finished")
