"""Saves as the HF Trainer does, at steps 100 and 200; of the second, optimizer.pt stays empty, as a
full disk leaves it. Then it waits to be killed; its next run says what it finds, and ends."""

import json
import os
import time

out = os.environ["SUBLET_OUTPUT_DIR"]
found = sorted(name for name in os.listdir(out) if name.startswith("checkpoint-"))
if found or os.environ["SUBLET_EPOCH"] != "1":
    print("resumed with", *found, flush=True)
    with open(os.path.join(out, "weights.json"), "w") as file:
        json.dump(found, file)
    raise SystemExit(0)
for step in (100, 200):
    folder = os.path.join(out, f"checkpoint-{step}")
    os.makedirs(folder)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("" if (step, name) == (200, "optimizer.pt") else "x" * 100)
    with open(os.path.join(folder, "trainer_state.json"), "w") as file:
        json.dump({"global_step": step, "max_steps": 500}, file)
    time.sleep(4)
print("both are there", flush=True)
time.sleep(600)
