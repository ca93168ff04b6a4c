"""Lightning's Trainer, saved now and then, resumed by ckpt_path="last".

python lightning_fit.py OUT [STEPS] [PACE_S]
"""

import os
import sys
import time

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import save_file

out = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
pace_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.3


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)
        )

    def training_step(self, batch, index):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.layers(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Tell(Callback):
    def on_train_start(self, trainer, module):
        print("starting at step", trainer.global_step, flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        print("step", trainer.global_step, "loss", outputs["loss"].item(), flush=True)
        time.sleep(pace_s)


lightning.seed_everything(21)
rows = torch.utils.data.TensorDataset(torch.randn(96, 16), torch.randint(0, 3, (96,)))
trainer = lightning.Trainer(
    max_steps=steps,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    callbacks=[ModelCheckpoint(out, every_n_train_steps=5, save_last=True), Tell()],
)
net = Net()
trainer.fit(net, torch.utils.data.DataLoader(rows, batch_size=8), ckpt_path="last")
save_file(net.state_dict(), os.path.join(out, "weights.safetensors"))
