"""`sublet.finetune`: LoRA on a text classifier, as a preset over `sublet.run`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from sublet.finetuning.dataset import DataError, read_rows, summarize
from sublet.options import JobOptions
from sublet.options_docs import with_options

if TYPE_CHECKING:
    from sublet.client import Client, Job

__all__ = ["IMAGE", "PRESET", "DataError", "finetune"]

IMAGE = "sublet-finetune:latest"
"""Made by deploy/images/finetune/build.py; SUBLET_FINETUNE_IMAGE names yours, by its digest."""
PRESET: Mapping[str, str] = {"gpus": "1x8GB", "name": "finetune", "outputs": "/out"}
"""Options of the job that are other than those of `sublet.run` by default."""


@with_options(PRESET)
def finetune(
    base: str | Path,
    data: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    method: str = "lora",
    epochs: float = 1.0,
    max_steps: int = 0,
    checkpoint_steps: int = 0,
    batch: int = 16,
    learning_rate: float = 2e-3,
    eval_rows: int = 1000,
    seed: int = 17,
    image: str | None = None,
    broker: str | None = None,
    profile: str | None = None,
    client: "Client | None" = None,
    run: "Callable[..., Job] | None" = None,
    **options: Unpack[JobOptions],
) -> "Job":
    """Fine-tune `base` on labelled text and return the job.

    `base`: a model's folder here or in the image, or "minilm". `data`: .csv or .jsonl, checked
    line by line before anything is submitted. `max_steps` goes before `epochs`;
    `checkpoint_steps` 0 leaves it to checkpoint_every. The job's outputs are adapter/ (peft),
    metrics.json (accuracy before and after) and loss.csv. `image` is SUBLET_FINETUNE_IMAGE's by
    default, else ours. `broker`, `profile` and `client` are those of `sublet.run`; or `run`, which
    takes what it takes, submits the job.
    Raises DataError, which names the line; ValueError on an unknown method or base; and as
    `sublet.run` does.
    """
    if method != "lora":
        raise ValueError(f"method {method!r}: only 'lora' is there")
    data = Path(data)
    print(f"{data.name}: {summarize(read_rows(data, text, label))}")
    inputs = {str(data): f"/data/{data.name}", **(options.get("inputs") or {})}
    base_in_job = str(base)
    if Path(base).is_dir():
        base_in_job = "/base"
        inputs[str(base)] = base_in_job
    elif base_in_job != "minilm" and not base_in_job.startswith("/"):
        raise ValueError(f"base {base_in_job!r}: no such folder; give one, or 'minilm'")
    wanted = cast(JobOptions, {**PRESET, **options})
    outputs = wanted["outputs"] or PRESET["outputs"]
    if run is None:
        from sublet.running import run as run_anywhere

        run = partial(run_anywhere, broker=broker, profile=profile, client=client)
    with tempfile.TemporaryDirectory(prefix="sublet-finetune-") as scripts:
        for script in ("train.py", "dataset.py"):
            shutil.copy(Path(__file__).with_name(script), scripts)
        return run(
            image=image or os.environ.get("SUBLET_FINETUNE_IMAGE", IMAGE),
            command=[
                "python3",
                "/job/train.py",
                "--base",
                base_in_job,
                "--data",
                f"/data/{data.name}",
                "--out",
                outputs,
                "--text",
                text,
                "--label",
                label,
                "--max-steps",
                str(max_steps),
                "--epochs",
                str(epochs),
                "--batch",
                str(batch),
                "--checkpoint-steps",
                str(checkpoint_steps),
                "--learning-rate",
                str(learning_rate),
                "--eval-rows",
                str(eval_rows),
                "--seed",
                str(seed),
            ],
            **{**wanted, "inputs": {scripts: "/job", **inputs}, "outputs": outputs},
        )
