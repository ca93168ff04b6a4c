"""`sublet.finetune`: LoRA on a text classifier, as a preset over `sublet.run`."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublet.finetuning.dataset import DataError, read_rows, summarize

if TYPE_CHECKING:
    from sublet.client import Job

__all__ = ["IMAGE", "DataError", "finetune"]

IMAGE = "sublet-finetune:latest"
"""Made by deploy/images/finetune/build.py; SUBLET_FINETUNE_IMAGE names yours, by its digest."""


def finetune(
    base: str | Path,
    data: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    method: str = "lora",
    max_price: float,
    budget: float,
    epochs: float = 1.0,
    max_steps: int = 0,
    checkpoint_steps: int = 0,
    batch: int = 16,
    learning_rate: float = 2e-3,
    eval_rows: int = 1000,
    seed: int = 17,
    gpus: str = "1x8GB",
    image: str | None = None,
    name: str = "finetune",
    run: Callable[..., "Job"] | None = None,
    **run_options: Any,
) -> "Job":
    """Fine-tune `base` on labelled text and return the job.

    `base`: a model's folder here or in the image, or "minilm". `data`: .csv or .jsonl, checked
    line by line before anything is submitted. `max_price` in credits per device-hour, `budget` in
    credits. `max_steps` goes before `epochs`; `checkpoint_steps` 0 leaves it to checkpoint_every.
    The job's outputs are adapter/ (peft), metrics.json (accuracy before and after) and loss.csv.
    All other options are those of `sublet.run`, or of the `run` given here, as a client's own.
    Raises DataError, which names the line; ValueError on an unknown method or base.
    """
    if method != "lora":
        raise ValueError(f"method {method!r}: only 'lora' is there")
    data = Path(data)
    print(f"{data.name}: {summarize(read_rows(data, text, label))}")
    inputs = {str(data): f"/data/{data.name}", **run_options.pop("inputs", {})}
    base_in_job = str(base)
    if Path(base).is_dir():
        base_in_job = "/base"
        inputs[str(base)] = base_in_job
    elif base_in_job != "minilm" and not base_in_job.startswith("/"):
        raise ValueError(f"base {base_in_job!r}: no such folder; give one, or 'minilm'")
    if run is None:
        import sublet

        run = sublet.run
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
                "/out",
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
            gpus=gpus,
            max_price=max_price,
            budget=budget,
            inputs={scripts: "/job", **inputs},
            outputs="/out",
            name=name,
            **run_options,
        )
