"""python3 gated_job.py GATE SCRIPT ARGUMENTS: a job whose durable writes are named as well."""

import os
import runpy
import sys

os.environ["SUBLET_GATE"] = sys.argv[1]
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401 - it installs itself

sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
