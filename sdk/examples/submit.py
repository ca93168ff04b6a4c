"""Submit train.py with its data, wait for it, bring the result back.

    SUBLET_BROKER=https://broker.example python submit.py IMAGE points.csv

IMAGE is any that has a python3. On a machine without a GPU of its own, say --gpus cpu.
"""

import argparse
import sys
from pathlib import Path

import sublet

parser = argparse.ArgumentParser()
parser.add_argument("image")
parser.add_argument("data")
parser.add_argument("--gpus", default="1")
parser.add_argument("--out", default="out")
options = parser.parse_args()

job = sublet.run(
    image=options.image,
    command=["python3", "/job/train.py", "--data", "/data/points.csv", "--out", "/out"],
    gpus=options.gpus,
    max_price=0.50,  # credits per device and hour: no machine above it is taken
    budget=1,  # credits: it never costs more
    checkpoint_every="1m",
    inputs={
        str(Path(__file__).with_name("train.py")): "/job/train.py",
        options.data: "/data/points.csv",
    },
    outputs="/out",
    name="line",
    memory="256MB",
    disk="256MB",
)
view = job.wait()
print(view.state, "-", view.says)
if view.state == "succeeded":
    for path in job.download(options.out):
        print(path)
sys.exit(0 if view.state == "succeeded" else 1)
