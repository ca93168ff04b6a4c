"""An ordinary Hugging Face Trainer script: nothing in it knows sublet.

What lets it go on elsewhere after its machine is lost stands in most Trainer scripts already: it
saves every `--save_steps` steps below `--output_dir`, and starts from the last checkpoint there.

    sublet run --gpus 1x24GB --max-price 0.40 --budget 5 --name sentiment \
        --input trainer.py:/job/trainer.py --input reviews.csv:/data/reviews.csv --outputs /out \
        IMAGE python /job/trainer.py --data /data/reviews.csv --output_dir /out --save_steps 100

The model is a small BERT over bytes, made from scratch, so that the script needs no download; with
`from_pretrained` and a tokenizer in its place, nothing else changes.
"""

import argparse
import csv
import os

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

LENGTH = 64


class Reviews(torch.utils.data.Dataset):
    """Rows of a CSV file with the columns `text` and `label` (0 or 1)."""

    def __init__(self, path):
        with open(path, newline="") as file:
            self.rows = list(csv.DictReader(file))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        text = list(self.rows[index]["text"].encode()[:LENGTH])
        return {
            "input_ids": torch.tensor(text + [0] * (LENGTH - len(text))),
            "attention_mask": torch.tensor([1] * len(text) + [0] * (LENGTH - len(text))),
            "labels": torch.tensor(int(self.rows[index]["label"])),
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--save_steps", type=int, default=100)
    options = parser.parse_args()

    set_seed(7)
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            save_steps=options.save_steps,
            save_total_limit=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            report_to="none",
            seed=7,
        ),
        train_dataset=Reviews(options.data),
    )
    last = get_last_checkpoint(options.output_dir) if os.path.isdir(options.output_dir) else None
    print("starting from", last or "the beginning", flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()


if __name__ == "__main__":
    main()
