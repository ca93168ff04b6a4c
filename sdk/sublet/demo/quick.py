"""The job of `sublet demo --quick`: a character model that learns from Python's own documentation.

    python quick.py --out out [--steps 40] [--every 5]

A network with one hidden layer predicts the next character from the eight before it, in numpy. Its
text is what the standard library says about itself, so nothing is fetched. Writes model.bin,
metrics.json and loss.csv to --out. Which examples a step sees follows from the step alone, and the
checkpoint holds weights, velocity and curve: a resumed run ends with the same bytes.
"""

import argparse
import csv
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

# Sums over threads are cut differently for each number of threads, and the bits with them.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402  (after the variables that it reads)

from sublet import ckpt  # noqa: E402  (in a job it comes from the agent)

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"
CONTEXT = 8
HIDDEN = 128
BATCH = 256
BATCHES_PER_STEP = 100
LEARNING_RATE = 0.3
MOMENTUM = 0.9
SEED = 17
MODULES = ("argparse", "calendar", "csv", "decimal", "doctest", "fractions", "gettext", "heapq",
           "inspect", "logging", "pathlib", "random", "shutil", "statistics", "string", "tarfile",
           "textwrap", "threading", "unittest", "zipfile")  # fmt: skip

SHAPES = ((CONTEXT * len(ALPHABET), HIDDEN), (HIDDEN,), (HIDDEN, len(ALPHABET)), (len(ALPHABET),))


def documentation() -> str:
    """Return what the standard library's modules say about themselves, in the model's alphabet."""
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        texts.append(module.__doc__ or "")
        for _, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) == name and inspect.isroutine(member):
                texts.append(member.__doc__ or "")
            elif getattr(member, "__module__", None) == name and inspect.isclass(member):
                methods = (function for _, function in sorted(vars(member).items()))
                texts += [f.__doc__ or "" for f in methods if inspect.isroutine(f)]
    words = " ".join(" ".join(texts).lower().split())
    return "".join(character for character in words if character in ALPHABET)


def examples(text: str) -> tuple[Any, Any]:
    """Return contexts and the characters after them, as indexes into the alphabet."""
    index = np.array([ALPHABET.index(character) for character in text], dtype=np.int64)
    contexts = np.lib.stride_tricks.sliding_window_view(index[:-1], CONTEXT)
    return contexts, index[CONTEXT:]


def forward(weights: list[Any], contexts: Any) -> tuple[Any, Any]:
    """Return the hidden layer and the next character's probabilities."""
    first, first_bias, second, second_bias = weights
    rows = contexts + np.arange(CONTEXT) * len(ALPHABET)
    hidden = np.tanh(first[rows].sum(axis=1) + first_bias)
    scores = hidden @ second + second_bias
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def train_batch(weights: list[Any], velocity: list[Any], contexts: Any, wanted: Any) -> float:
    """One step of gradient descent with momentum, in place; return the loss before it."""
    count = len(wanted)
    hidden, probabilities = forward(weights, contexts)
    loss = float(-np.log(probabilities[np.arange(count), wanted]).mean())
    error = probabilities
    error[np.arange(count), wanted] -= 1.0
    error /= count
    back = (error @ weights[2].T) * (1.0 - hidden * hidden)
    one_hot = np.zeros((count, SHAPES[0][0]))
    rows = contexts + np.arange(CONTEXT) * len(ALPHABET)
    one_hot[np.arange(count)[:, None], rows] = 1.0
    gradients = (one_hot.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
    for weight, speed, gradient in zip(weights, velocity, gradients, strict=True):
        speed *= MOMENTUM
        speed -= LEARNING_RATE * gradient
        weight += speed
    return loss


def accuracy(weights: list[Any], contexts: Any, wanted: Any) -> float:
    """Return the share of characters that the model foretells."""
    return float((forward(weights, contexts)[1].argmax(axis=1) == wanted).mean())


def packed(arrays: list[Any]) -> bytes:
    """Return arrays as bytes, one after the other."""
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpacked(data: bytes) -> list[Any]:
    """Return the arrays that `packed` made bytes of."""
    flat, arrays, start = np.frombuffer(data), [], 0
    for shape in SHAPES:
        size = int(np.prod(shape))
        arrays.append(flat[start : start + size].reshape(shape).copy())
        start += size
    return arrays


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training; return the exit code."""
    parser = argparse.ArgumentParser(description="a character model")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps from checkpoint to checkpoint")
    options = parser.parse_args(arguments)

    contexts, wanted = examples(documentation())
    held = len(wanted) // 10
    test = (contexts[-held:], wanted[-held:])
    contexts, wanted = contexts[:-held], wanted[:-held]

    restored = ckpt.restore()
    if restored is None:
        generator = np.random.default_rng(SEED)
        weights = [generator.normal(0.0, 0.1, shape) for shape in SHAPES]
        velocity = [np.zeros(shape) for shape in SHAPES]
        step, curve = 0, []
        before = accuracy(weights, *test)
        print(f"{len(wanted)} characters; accuracy before: {before:.4f}", flush=True)
    else:
        weights = unpacked((restored / "weights.bin").read_bytes())
        velocity = unpacked((restored / "velocity.bin").read_bytes())
        step, curve, before = restored.step, restored.meta["curve"], restored.meta["before"]
        print(f"resuming from step {step} of {options.steps}", flush=True)

    while step < options.steps:
        losses = []
        generator = np.random.default_rng([SEED, step])
        for _ in range(BATCHES_PER_STEP):
            chosen = generator.integers(0, len(wanted), BATCH)
            losses.append(train_batch(weights, velocity, contexts[chosen], wanted[chosen]))
        step += 1
        loss = sum(losses) / len(losses)
        curve.append(loss)
        print(f"step {step}/{options.steps} loss {loss:.4f}", flush=True)
        ckpt.progress(step, options.steps, loss=loss)
        stop = ckpt.should_stop() and step < options.steps
        if stop or ckpt.should_save() or step % options.every == 0:
            state = {"weights.bin": packed(weights), "velocity.bin": packed(velocity)}
            ckpt.save(step, state, meta={"curve": curve, "before": before})
        if stop:
            ckpt.exit_preempted()

    after = accuracy(weights, *test)
    print(f"accuracy after: {after:.4f}", flush=True)
    write_results(Path(options.out), weights, curve, before, after)
    return 0


def write_results(
    out: Path, weights: list[Any], curve: list[float], before: float, after: float
) -> None:
    """Write the model, the metrics and the curve of the loss."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.bin").write_bytes(packed(weights))
    with (out / "loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(curve, start=1)])
    metrics = {"accuracy_before": before, "accuracy_after": after, "steps": len(curve)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
