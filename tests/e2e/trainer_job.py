"""Runs a training script as it is, but slower: a tiny model is too quick for a fault to meet it.

    python trainer_job.py PACE_S SCRIPT ARGUMENTS...

Transformers' default callbacks get one more, which sleeps after each step as a GPU's work would.
"""

import runpy
import sys
import time

from transformers import TrainerCallback, trainer


class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        time.sleep(PACE_S)


PACE_S = float(sys.argv[1])
trainer.DEFAULT_CALLBACKS.append(Pace)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
