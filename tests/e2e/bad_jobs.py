"""Jobs that misbehave, as Python for containers, and checkpoints that break the rules."""

import textwrap

FAILS = "print('no column named lable', flush=True); raise SystemExit(3)"

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True:
    time.sleep(1)
"""

FILLS_ITS_DISK = """
import os
print("filling", flush=True)
for part in range(10_000):
    try:
        with open(f"/out/part-{part}", "wb") as file:
            file.write(os.urandom(4 << 20))
    except OSError as error:
        print("the system says", error, flush=True)
        break
import time
time.sleep(600)
"""

FILLS_ITS_TMP = """
try:
    with open("/tmp/big", "wb") as file:
        while True:
            file.write(b"x" * (1 << 20))
except OSError as error:
    print("the system says", error, flush=True)
"""

# At the limit each of them waits a while: it's the number that is tested here, not the load.
FORKS = """
import os, time
print("forking", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(20)
"""

MARK = "[%07d]"
LOUD_LINES = 100_000

LOUD = f"""
import sys
for number in range({LOUD_LINES}):
    sys.stdout.write("{MARK}" % number + "x" * 990 + "\\n")
print("the end", flush=True)
open("/out/result", "w").write("as it should be")
"""

# Saves steps 1 and 2 and then waits for its end; whoever restores it says from where. What it saves
# is its own: the same content of another job would heal what is damaged here.
TWO_STEPS = """
import os, time, pathlib
import sublet_ckpt as ckpt
found = ckpt.restore()
def state_of(step):
    return f"state of step {step} of {os.environ['SUBLET_JOB_ID']} ".encode() * 1000
if found is None:
    for step in (1, 2):
        ckpt.save(step, {"state": state_of(step)})
        while not os.path.exists(os.environ["SUBLET_CHECKPOINT_DIR"] + f"/ack/step-{step}"):
            time.sleep(0.05)
    print("both are durable", flush=True)
    time.sleep(600)
state = (pathlib.Path(str(found.path)) / "state").read_bytes()
assert state == state_of(found.step)
open("/out/from", "w").write(str(found.step))
"""

_BREAKS = {
    "torn": """
        write("a", b"a" * 9)
        done([("a", b"a" * 9), ("b", b"b" * 9)])
    """,
    "truncated": """
        write("a", b"a" * 5)
        done([("a", b"a" * 9)])
    """,
    "more than it says": """
        write("a", b"a" * 9)
        write("b", b"b" * 9)
        done([("a", b"a" * 9)])
    """,
    "another step": """
        write("a", b"a" * 9)
        done([("a", b"a" * 9)], step=7)
    """,
    "no JSON": """
        write("a", b"a" * 9)
        write("DONE", b"{" * 100_000)
    """,
    "leads out": """
        write("a", b"a" * 9)
        done([("../../a", b"a" * 9)])
    """,
    "a link": """
        os.symlink("/etc/passwd", folder + "/a")
        done([("a", b"a" * 9)])
    """,
    "a linked folder": """
        os.symlink("/etc", folder + "/sub")
        done([])
    """,
    "a pipe": """
        os.mkfifo(folder + "/a")
        done([])
    """,
    "too large": """
        for name in "ab":
            with open(folder + "/" + name, "wb") as file:
                file.truncate(40 << 20)
        done([("a", b""), ("b", b"")])
    """,
}
"""How each breaks the rules, in a folder that becomes out/step-2."""

_AROUND = """
import hashlib, json, os, time
import sublet_ckpt as ckpt
root = os.environ["SUBLET_CHECKPOINT_DIR"]
ckpt.save(1, {{"good": b"good"}})
while not os.path.exists(root + "/ack/step-1"):
    time.sleep(0.05)
folder = root + "/out/step-2.tmp"
os.mkdir(folder)

def write(name, data):
    with open(folder + "/" + name, "wb") as file:
        file.write(data)

def done(files, step=2):
    listed = [{{"path": name, "size_bytes": len(data)}} for name, data in files]
    write("DONE", json.dumps({{"step": step, "files": listed, "meta": {{}}}}).encode())

{breaks}
os.rename(folder, root + "/out/step-2")
open("/out/result", "w").write("fine")
"""

SAYS = {
    "torn": "b is not as DONE says",
    "truncated": "a is not as DONE says",
    "more than it says": "b is not as DONE says",
    "another step": "DONE says step 7",
    "no JSON": "DONE can't be read",
    "leads out": "is not as DONE says",
    "a link": "link",
    "a linked folder": "link",
    "a pipe": "neither a file nor a folder",
    "too large": "holds more than",
}
"""What the job's log says about each."""


def breaking(how: str) -> str:
    """Return a job that saves a good step 1, a bad step 2 and good outputs."""
    return _AROUND.format(breaks=textwrap.dedent(_BREAKS[how]))
