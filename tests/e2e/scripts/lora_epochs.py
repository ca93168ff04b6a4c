"""LoRA in a loop of its own: a file for each epoch in ./checkpoints, the adapter at the end."""

import argparse
import glob
import os
import re
import time

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--ckpt_dir", default="./checkpoints")
parser.add_argument("--pace_s", type=float, default=2.0)
args = parser.parse_args()

torch.manual_seed(0)
base = BertForSequenceClassification(
    BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
)
model = get_peft_model(
    base, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = torch.randint(0, 64, (96, 16))
labels = (tokens[:, 0] > 31).long()

os.makedirs(args.ckpt_dir, exist_ok=True)
start = 0
if args.resume:
    files = glob.glob(f"{args.ckpt_dir}/epoch_*.pt")
    if files:
        newest = max(files, key=lambda name: int(re.findall(r"\d+", os.path.basename(name))[0]))
        saved = torch.load(newest)
        set_peft_model_state_dict(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"] + 1
        print("resumed from", newest, "at epoch", start, flush=True)

for epoch in range(start, args.epochs):
    torch.manual_seed(100 + epoch)
    for at in range(0, 96, 8):
        loss = model(input_ids=tokens[at : at + 8], labels=labels[at : at + 8]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {
            "model": get_peft_model_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
        },
        f"{args.ckpt_dir}/epoch_{epoch}.pt",
    )
    print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)
    time.sleep(args.pace_s)

model.save_pretrained("adapter")
print("done")
