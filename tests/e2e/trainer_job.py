"""Runs a training script as it is, but slower: a tiny model is too quick for a fault to meet it.

    python trainer_job.py PACE_S HOLD_AT[,HOLD_AT...] SCRIPT ARGUMENTS...

Transformers' default callbacks get one more, which sleeps after each step as a GPU's work would. In
the job's first run it stops at step HOLD_AT, in its second at the next of them, so that a fault
can't come too late either.
"""

import os
import runpy
import sys
import time

from transformers import TrainerCallback, trainer


class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        time.sleep(PACE_S)
        while len(HOLD_AT) >= EPOCH and state.global_step == HOLD_AT[EPOCH - 1]:
            time.sleep(0.05)


PACE_S, HOLD_AT = float(sys.argv[1]), [int(step) for step in sys.argv[2].split(",")]
EPOCH = int(os.environ["SUBLET_EPOCH"])
trainer.DEFAULT_CALLBACKS.append(Pace)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
