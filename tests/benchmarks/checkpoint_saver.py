"""A job that saves one large file twice by the protocol, the second time with some of it changed.

    python checkpoint_saver.py FIRST SECOND TIMES

FIRST and SECOND hold the content, which is read before anything is timed. TIMES gets, for each
save, the seconds from its call to the rename and to the agent's ack: durable off the machine.
"""

import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["SUBLET_CHECKPOINT_DIR"])
LIMIT_S = 300.0
PIECE_BYTES = 1 << 20
"""written at once, as the helper, torch and cp write: a single write of it all is far slower"""


def save(step: int, content: bytes) -> dict[str, float]:
    """Save, and wait until it is durable."""
    began = time.monotonic()
    writing = FOLDER / "out" / f"step-{step}.tmp"
    writing.mkdir(parents=True)
    with (writing / "model.bin").open("wb", buffering=0) as model:
        for at in range(0, len(content), PIECE_BYTES):
            model.write(memoryview(content)[at : at + PIECE_BYTES])
    listed = [{"path": "model.bin", "size_bytes": len(content)}]
    done = {"step": step, "files": listed, "meta": {}}
    (writing / "DONE").write_text(json.dumps(done))
    writing.rename(FOLDER / "out" / f"step-{step}")
    saved = time.monotonic()
    while not (FOLDER / "ack" / f"step-{step}").exists():
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"step {step} was not durable within {LIMIT_S:.0f} s")
        time.sleep(0.005)
    return {"saved_s": saved - began, "durable_s": time.monotonic() - began}


def main(first: str, second: str, times: str) -> None:
    """Save both."""
    contents = [Path(path).read_bytes() for path in (first, second)]
    found = [save(step, content) for step, content in enumerate(contents, start=1)]
    aside = Path(f"{times}.tmp")
    aside.write_text(json.dumps(found))
    aside.rename(times)


if __name__ == "__main__":
    main(*sys.argv[1:])
