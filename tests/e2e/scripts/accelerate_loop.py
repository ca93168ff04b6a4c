"""A loop with Hugging Face Accelerate, its checkpoints named automatically, resumed from the last.

python accelerate_loop.py OUT [STEPS] [PACE_S]
"""

import os
import sys
import time

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import save_file

out = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
pace_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.3
every, per_epoch = 5, 12


class Counter:
    """How far the training is; kept with the state by register_for_checkpointing."""

    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


accelerator = Accelerator(
    cpu=True,
    project_config=ProjectConfiguration(
        project_dir=out, automatic_checkpoint_naming=True, total_limit=3
    ),
)
set_seed(21)
rows = torch.utils.data.TensorDataset(torch.randn(96, 16), torch.randint(0, 3, (96,)))
model = torch.nn.Sequential(
    torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 3)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
counter = Counter()
accelerator.register_for_checkpointing(counter)

kept = os.path.join(out, "checkpoints")
saved = sorted(int(name.split("_")[-1]) for name in os.listdir(kept)) if os.path.isdir(kept) else []
if saved:
    accelerator.load_state()
    accelerator.project_configuration.iteration = saved[-1] + 1
print("starting at step", counter.step, flush=True)

while counter.step < steps:
    epoch, at = divmod(counter.step, per_epoch)
    # The order of an epoch's batches depends on the epoch alone, so that a resume finds its place.
    order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
    inputs, labels = rows[order[8 * at : 8 * at + 8]]
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    accelerator.backward(loss)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    counter.step += 1
    if counter.step % every == 0:
        accelerator.save_state()
    print("step", counter.step, "loss", loss.item(), flush=True)
    time.sleep(pace_s)

save_file(accelerator.unwrap_model(model).state_dict(), os.path.join(out, "weights.safetensors"))
