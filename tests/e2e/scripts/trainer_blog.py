"""Fine-tuning with the Trainer as blogs show it: `results` in the working folder, nothing more.

    python trainer_blog.py [every | best | one]

every: saves and keeps them all; best: load_best_model_at_end; one: save_total_limit=1.
"""

import os
import sys

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

manner = sys.argv[1] if len(sys.argv) > 1 else "every"
more = {
    "every": {},
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
    },
    "one": {"save_total_limit": 1},
}[manner]


class Rows(torch.utils.data.Dataset):
    def __init__(self, seed, number):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 64, (number, 12), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": torch.tensor(int(tokens[0] > 31))}


set_seed(4)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="results",
        max_steps=30,
        save_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
        **more,
    ),
    train_dataset=Rows(5, 160),
    eval_dataset=Rows(6, 32),
)
last = get_last_checkpoint("results") if os.path.isdir("results") else None
print("starting from", last or "the beginning", flush=True)
trainer.train(resume_from_checkpoint=last)
trainer.save_model("final")
