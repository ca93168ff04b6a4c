"""A training script that survives the loss of its machine: runs here, in any image, under sublet.

    python train.py --data points.csv --out out

Fits a line to points by gradient descent, in plain Python. Stop it at any step and start it again:
it goes on from its last checkpoint and ends with the same bytes.
"""

import argparse
import csv
import json
from pathlib import Path

try:
    import sublet_ckpt as ckpt  # put there by the agent
except ImportError:
    from sublet import ckpt  # on your own machine

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=400)
options = parser.parse_args()

with open(options.data, newline="") as file:
    points = [(float(row["x"]), float(row["y"])) for row in csv.DictReader(file)]

last = ckpt.restore()
state = json.loads((last / "state.json").read_text()) if last else {"slope": 0.0, "shift": 0.0}
step = last.step if last else 0
print(f"{len(points)} points, from step {step}", flush=True)

while step < options.steps:
    errors = [(x, state["slope"] * x + state["shift"] - y) for x, y in points]
    state["slope"] -= 0.1 * sum(error * x for x, error in errors) / len(points)
    state["shift"] -= 0.1 * sum(error for _, error in errors) / len(points)
    step += 1
    ckpt.progress(step, options.steps, loss=sum(e * e for _, e in errors) / len(points))
    stop = ckpt.should_stop()
    if stop or step % 100 == 0 or ckpt.should_save():
        ckpt.save(step, {"state.json": json.dumps(state).encode()})
    if stop:
        ckpt.exit_preempted()

Path(options.out).mkdir(parents=True, exist_ok=True)
(Path(options.out) / "line.json").write_text(json.dumps(state))
print(f"y = {state['slope']:.3f} x + {state['shift']:.3f}", flush=True)
