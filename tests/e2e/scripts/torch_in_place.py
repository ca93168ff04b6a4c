"""A small net whose checkpoint is written over itself in the working folder, after each step."""

import os
import sys
import time

import torch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
pace_s = float(sys.argv[2]) if len(sys.argv) > 2 else 0.3

torch.manual_seed(3)
net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
step = 0
if os.path.exists("ckpt.pt"):
    saved = torch.load("ckpt.pt")
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    step = saved["step"]
    print("resume at", step, flush=True)
else:
    print("cold start in", os.getcwd(), flush=True)

while step < steps:
    batch = torch.randn(16, 32)
    loss = (net(batch) - batch.flip(1)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    torch.save(
        {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
        },
        "ckpt.pt",
    )
    print("step", step, "loss", loss.item(), flush=True)
    time.sleep(pace_s)

with open("weights.f32", "wb") as file:
    for tensor in net.state_dict().values():
        file.write(tensor.numpy().tobytes())
print("end")
