"""Runs a script as it is, but in the job's first run stands still once it has printed a line that
begins with certain words: a fault that is to meet it there can't come too late.

    python hold.py WORDS SCRIPT ARGUMENTS...

WORDS may be several, for its first run, its second, and so on: "step 7|step 12".
"""

import builtins
import os
import runpy
import sys
import time

held, sys.argv = sys.argv[1].split("|"), sys.argv[2:]
epoch = int(os.environ["SUBLET_EPOCH"])
words = held[epoch - 1] + " " if epoch <= len(held) else None
plain_print = builtins.print


def print_and_hold(*values, **options):
    plain_print(*values, **options)
    line = " ".join(map(str, values)) + " "
    while words is not None and line.startswith(words):
        time.sleep(0.05)


builtins.print = print_and_hold
# As `python SCRIPT` has it.
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
