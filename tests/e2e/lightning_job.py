"""A script that knows nothing of sublet, and whose files and manners are those of Lightning.

    python lightning_job.py --data numbers.csv --out /out --steps 60 --every 10 --pace-s 0.3

As ModelCheckpoint(out, every_n_train_steps=N, save_last=True) with fit(ckpt_path="last"): it
writes epoch=E-step=S.ckpt, then last.ckpt, each first elsewhere and then moved there; deletes the
one before; goes on from the newest last*.ckpt; and when TERM comes it leaves after the batch by
SystemExit without a code, which is exit code 0. The files are ZIPs that hold a pickle, as torch
writes them; the model is plain Python, which starts at once.
"""

import argparse
import glob
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile

FEATURES, HIDDEN = 4, 8


def save(path, state):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(state))
    descriptor, aside = tempfile.mkstemp()
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.getvalue())
    shutil.move(aside, path)


def load(path):
    with zipfile.ZipFile(path) as file:
        return pickle.loads(file.read("archive/data.pkl"))  # noqa: S301  (its own file)


def train_step(state, row):
    """One step of momentum SGD on a net with dropout; all of its state is in `state`."""
    inner, outer, dice = state["inner"], state["outer"], state["dice"]
    hidden = [math.tanh(sum(w * x for w, x in zip(unit, row))) for unit in inner]
    kept = [h * 1.25 if dice.random() < 0.8 else 0.0 for h in hidden]
    error = sum(w * h for w, h in zip(outer, kept)) - row[-1]
    for j in range(HIDDEN):
        back = error * outer[j] * (1.25 - 1.25 * hidden[j] ** 2) if kept[j] else 0.0
        gradients = [*(back * x for x in row[:FEATURES]), error * kept[j]]
        momentum = state["momentum"][j] = [
            0.9 * m + g for m, g in zip(state["momentum"][j], gradients)
        ]
        inner[j] = [w - 0.01 * m for w, m in zip(inner[j], momentum)]
        outer[j] -= 0.01 * momentum[-1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--pace-s", type=float, default=0.0)
    # So that a fault that is to hit its first run can't come too late.
    parser.add_argument("--hold-at", type=int, default=0)
    options = parser.parse_args()

    os.makedirs(options.out, exist_ok=True)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    with open(options.data) as file:
        rows = [[float(x) for x in line.split(",")] for line in file]

    dice = random.Random(3)
    state = {
        "global_step": 0,
        "best": None,
        "optimizer_states": [],  # as Lightning writes it, unless it saves the weights alone
        "dice": dice,
        "inner": [[dice.gauss(0.0, 0.5) for _ in range(FEATURES)] for _ in range(HIDDEN)],
        "outer": [dice.gauss(0.0, 0.5) for _ in range(HIDDEN)],
        "momentum": [[0.0] * (FEATURES + 1) for _ in range(HIDDEN)],
    }
    lasts = glob.glob(os.path.join(options.out, "last*.ckpt"))
    if lasts:
        state = load(max(lasts, key=os.path.getmtime))
    step = state["global_step"]
    print("starting from step", step, flush=True)

    while step < options.steps:
        train_step(state, rows[state["dice"].randrange(len(rows))])
        step = state["global_step"] = step + 1
        time.sleep(options.pace_s)
        while step == options.hold_at and os.environ["SUBLET_EPOCH"] == "1" and not asked:
            time.sleep(0.05)
        if asked:
            print("TERM: leaving at step", step, flush=True)
            raise SystemExit
        if step % options.every == 0:
            before, best = state["best"], f"epoch={step // 15}-step={step}.ckpt"
            state["best"] = best
            save(os.path.join(options.out, best), state)
            save(os.path.join(options.out, "last.ckpt"), state)
            if before and os.path.exists(os.path.join(options.out, before)):
                os.remove(os.path.join(options.out, before))
    with open(os.path.join(options.out, "weights.json"), "w") as file:
        json.dump([state["inner"], state["outer"]], file)


if __name__ == "__main__":
    sys.exit(main())
