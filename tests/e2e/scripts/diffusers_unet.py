"""A small UNet trained to remove noise, as the training scripts of diffusers are built.

    python diffusers_unet.py --output_dir OUT [--max_train_steps N] [--pace_s S]

checkpoint-N is written by Accelerate; hooks put the model and its average (EMA) into folders of
their own, and only the newest few are kept.
"""

import argparse
import os
import shutil
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_train_steps", type=int, default=20)
parser.add_argument("--checkpointing_steps", type=int, default=5)
parser.add_argument("--checkpoints_total_limit", type=int, default=2)
parser.add_argument("--resume_from_checkpoint", default="latest")
parser.add_argument("--pace_s", type=float, default=0.0)
args = parser.parse_args()

accelerator = Accelerator(cpu=True)
set_seed(8)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
noise_scheduler = DDPMScheduler(num_train_timesteps=50)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=args.max_train_steps)


def save_models(models, weights, folder):
    ema.save_pretrained(os.path.join(folder, "unet_ema"))
    for model in models:
        model.save_pretrained(os.path.join(folder, "unet"))
        weights.pop()


def load_models(models, folder):
    global ema
    ema = EMAModel.from_pretrained(os.path.join(folder, "unet_ema"), UNet2DModel)
    while models:
        loaded = UNet2DModel.from_pretrained(os.path.join(folder, "unet"))
        models.pop().load_state_dict(loaded.state_dict())


accelerator.register_save_state_pre_hook(save_models)
accelerator.register_load_state_pre_hook(load_models)
unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)


def checkpoints():
    os.makedirs(args.output_dir, exist_ok=True)
    names = [name for name in os.listdir(args.output_dir) if name.startswith("checkpoint-")]
    return sorted(names, key=lambda name: int(name.split("-")[1]))


global_step = 0
if args.resume_from_checkpoint == "latest" and checkpoints():
    newest = checkpoints()[-1]
    accelerator.load_state(os.path.join(args.output_dir, newest))
    global_step = int(newest.split("-")[1])
print("starting at step", global_step, flush=True)

images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
while global_step < args.max_train_steps:
    at = 4 * global_step % 64
    clean = images[at : at + 4]
    noise = torch.randn_like(clean)
    times = torch.randint(0, 50, (4,))
    guess = unet(noise_scheduler.add_noise(clean, noise, times), times).sample
    loss = torch.nn.functional.mse_loss(guess, noise)
    accelerator.backward(loss)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    ema.step(unet.parameters())
    global_step += 1
    if global_step % args.checkpointing_steps == 0:
        for old in checkpoints()[: -(args.checkpoints_total_limit - 1)]:
            shutil.rmtree(os.path.join(args.output_dir, old))
        accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
    print("step", global_step, "loss", loss.item(), flush=True)
    time.sleep(args.pace_s)

accelerator.unwrap_model(unet).save_pretrained(os.path.join(args.output_dir, "unet"))
