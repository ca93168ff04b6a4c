"""Runs a training script as it is, and keeps what its folder held each time something was written.

    python watched.py FOLDER STATES SCRIPT ARGUMENTS...

STATES/NNN is a copy of FOLDER, with the files' times: before each file that Python opens to write,
each rename and each deletion, and after each file that torch or safetensors has written (they open
theirs by themselves). STATES/NNN.rest is one at a moment at which nothing is being saved: when the
script prints a line. Nothing of the script or its libraries is replaced but for what they call.
"""

import builtins
import os
import runpy
import shutil
import sys
from pathlib import Path

folder, states, sys.argv = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[3:]
states.mkdir(parents=True)
busy = False
count = 0


def keep(ending=""):
    global busy, count
    if busy or not folder.is_dir():
        return
    busy = True
    target = states / f"{count:04}{ending}"
    while True:
        try:
            shutil.copytree(folder, target)
            break
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(target)  # another thread has renamed something meanwhile
    count += 1
    busy = False


def on_event(event, arguments):
    if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, (str, os.PathLike)):
        return
    writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes and folder in Path(path).absolute().parents:
        keep()


def then_keep(module, name):
    plain = getattr(module, name)

    def call(*values, **options):
        result = plain(*values, **options)
        keep()
        return result

    setattr(module, name, call)


import safetensors.torch  # noqa: E402
import torch  # noqa: E402

then_keep(torch, "save")
then_keep(safetensors.torch, "save_file")
plain_print = builtins.print


def print_and_keep(*values, **options):
    plain_print(*values, **options)
    keep(".rest")


builtins.print = print_and_keep
sys.addaudithook(on_event)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
