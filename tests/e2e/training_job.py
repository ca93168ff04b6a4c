"""The job of the end-to-end tests: a model trained by gradient descent, in plain Python.

Its weights depend on every step before, in order, and on the state of its random generator, so a
resume that loses or repeats anything ends with other bytes. Runs in any image that has a Python.

    python training_job.py --steps 60 --every 5 --pace-s 0.2 --out /out
"""

import argparse
import json
import math
import os
import random
import sys
import time

import sublet_ckpt as ckpt

FEATURES = 48


def example(generator):
    features = [generator.gauss(0.0, 1.0) for _ in range(FEATURES)]
    label = 1.0 if sum(features[::3]) > sum(features[1::3]) else 0.0
    return features, label


def train_step(weights, generator):
    loss = 0.0
    gradient = [0.0] * FEATURES
    for _ in range(16):
        features, label = example(generator)
        score = sum(w * x for w, x in zip(weights, features))
        predicted = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score))))
        loss -= math.log(predicted if label else 1.0 - predicted)
        for i, x in enumerate(features):
            gradient[i] += (predicted - label) * x
    return [w - 0.01 * g for w, g in zip(weights, gradient)], loss / 16


def load(folder):
    with open(os.path.join(str(folder), "state.json")) as file:
        state = json.load(file)
    generator = random.Random()
    version, internal, gauss = state["generator"]
    generator.setstate((version, tuple(internal), gauss))
    return state["weights"], generator


def dump(weights, generator):
    return json.dumps({"weights": weights, "generator": generator.getstate()}).encode()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--pace-s", type=float, default=0.2)
    # So that a fault that is to hit its first run can't come too late.
    parser.add_argument("--hold-at", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    restored = ckpt.restore()
    if restored is None:
        step, weights, generator = 0, [0.0] * FEATURES, random.Random(1234)
    else:
        step = restored.step
        weights, generator = load(restored.path)
    print(f"starting at step {step}", flush=True)
    while step < options.steps:
        weights, loss = train_step(weights, generator)
        step += 1
        # The pace stands for a GPU's work: it leaves time in which a fault can happen.
        time.sleep(options.pace_s)
        print(f"step {step} loss {loss:.4f}", flush=True)
        ckpt.progress(step, options.steps, loss=loss)
        while step == options.hold_at and os.environ["SUBLET_EPOCH"] == "1":
            if ckpt.should_stop():
                break
            time.sleep(0.05)
        stop = ckpt.should_stop()
        if step % options.every == 0 or stop or ckpt.should_save():
            ckpt.save(step, {"state.json": dump(weights, generator)})
        if stop and step < options.steps:
            ckpt.exit_preempted()
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "weights.json"), "wb") as file:
        file.write(dump(weights, generator))
    print("done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
