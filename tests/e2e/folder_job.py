"""A script that has never heard of sublet: it trains, and saves where and as it likes.

    python folder_job.py WAY [--folder DIR] [--out DIR] [--steps N] [--pace-s S] [--hold-at STEP]

WAY  atomic   a pickle in DIR, written elsewhere and moved there
     inplace  a ZIP, as torch.save writes it, in DIR, over and over the same file
     epochs   a file for each of ten steps in DIR, and goes on from the newest
     growing  one file in DIR that it appends to and keeps open
     shell    a number in DIR, by the shell's means

It ends with OUT/weights.json, which depends on every step having been made exactly once. In the
job's first run it stops at step HOLD_AT.
"""

import argparse
import glob
import json
import os
import pickle
import random
import re
import subprocess
import time
import zipfile

parser = argparse.ArgumentParser()
parser.add_argument("way")
parser.add_argument("--folder", default=".")
parser.add_argument("--out", default="out")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--pace-s", type=float, default=0.0)
parser.add_argument("--hold-at", type=int, default=-1)
options = parser.parse_args()
os.makedirs(options.folder, exist_ok=True)
at = os.path.join(options.folder, "state")


def trained(state):
    """Make one step; what comes of it depends on all before."""
    generator = random.Random(state["step"])
    weights = [0.9 * w + 0.1 * generator.gauss(w, 1.0) for w in state["weights"]]
    return {"step": state["step"] + 1, "weights": weights}


def load():
    if options.way == "atomic" and os.path.exists(at + ".pkl"):
        with open(at + ".pkl", "rb") as file:
            return pickle.load(file)  # noqa: S301 - its own
    if options.way == "inplace" and os.path.exists(at + ".pt"):
        with zipfile.ZipFile(at + ".pt") as archive:
            return json.loads(archive.read("archive/data"))
    if options.way == "epochs":
        files = glob.glob(os.path.join(options.folder, "epoch_*.json"))
        if files:
            newest = max(files, key=lambda path: int(re.findall(r"\d+", path)[-1]))
            with open(newest) as file:
                return json.load(file)
    if options.way == "shell" and os.path.exists(at):
        step = int(subprocess.check_output(["sh", "-c", f"cat {at}"]))
        state = {"step": 0, "weights": [1.0] * 20}
        while state["step"] < step:
            state = trained(state)
        return state
    return {"step": 0, "weights": [1.0] * 20}


def save(state):
    if options.way == "atomic":
        with open(at + ".tmp", "wb") as file:
            pickle.dump(state, file)
        os.replace(at + ".tmp", at + ".pkl")
    elif options.way == "inplace":
        with zipfile.ZipFile(at + ".pt", "w") as archive:
            archive.writestr("archive/data", json.dumps(state))
            archive.writestr("archive/filler", random.Random(1).randbytes(200_000))
    elif options.way == "epochs" and state["step"] % 10 == 0:
        with open(os.path.join(options.folder, f"epoch_{state['step']}.json"), "w") as file:
            json.dump(state, file)
    elif options.way == "growing":
        growing.write(json.dumps(state) + "\n")
    elif options.way == "shell":
        subprocess.check_call(["sh", "-c", f"echo {state['step']} > {at}"])


growing = None
if options.way == "growing":
    growing = open(at + ".bin", "a", buffering=1)  # noqa: SIM115 - it never closes it
state = load()
print("begins at step", state["step"], flush=True)
with open(os.path.join(options.folder, "metrics.csv"), "a") as metrics:
    while state["step"] < options.steps:
        state = trained(state)
        save(state)
        metrics.write(f"{state['step']},{state['weights'][0]}\n")
        metrics.flush()
        time.sleep(options.pace_s)
        while state["step"] == options.hold_at and os.environ.get("SUBLET_EPOCH") == "1":
            time.sleep(0.05)
os.makedirs(options.out, exist_ok=True)
with open(os.path.join(options.out, "weights.json"), "w") as file:
    json.dump(state["weights"], file)
