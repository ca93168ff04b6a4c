"""Scripts whose renters should be told something while they run.

    python told_job.py WAY [--folder DIR] [--save-after-s S] [--for-s S]

WAY  scratch  a pickle in DIR, well written, loaded if it is there: of no layout that is known
     late     saves by the helper, first after S seconds
     loads    a pickle in DIR, and goes on from it
     forgets  the same, and begins at 0 each time
"""

import argparse
import os
import pickle
import time

parser = argparse.ArgumentParser()
parser.add_argument("way")
parser.add_argument("--folder", default=".")
parser.add_argument("--save-after-s", type=float, default=0.0)
parser.add_argument("--for-s", type=float, default=600.0)
options = parser.parse_args()
os.makedirs(options.folder, exist_ok=True)
path = os.path.join(options.folder, "state.pkl")
began = time.monotonic()

state = {"step": 0, "weights": [0.0] * 10_000}
if options.way in ("scratch", "loads") and os.path.exists(path):
    with open(path, "rb") as file:
        state = pickle.load(file)  # noqa: S301 - its own file
print("begins at", state["step"], flush=True)

while time.monotonic() - began < options.for_s:
    time.sleep(0.5)
    state["step"] += 1
    if options.way == "late":
        import sublet_ckpt as ckpt

        ckpt.progress(state["step"])
        if time.monotonic() - began >= options.save_after_s and state["step"] % 4 == 0:
            ckpt.save(state["step"], {"state.pkl": pickle.dumps(state)})
        continue
    if state["step"] % 4 == 0:
        with open(path + ".tmp", "wb") as file:
            pickle.dump(state, file)
        os.replace(path + ".tmp", path)
print("ended at", state["step"], flush=True)
