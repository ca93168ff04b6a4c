"""python -m tests.chaos: kill real processes until N kills are done; every promise must hold."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from sublet.demo.local import LocalMarketError
from tests.chaos.churn import Churn, ChurnFailed


def main() -> int:
    """Run it. 0: all promises held; 1: one didn't, and its logs are kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, help="of what is killed when; default: drawn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what it came to")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    root = Path(tempfile.mkdtemp(prefix="sublet-chaos-"))
    print(f"{options.kills} kills, seed {seed}, in {root}", flush=True)
    churn = Churn(root, options.kills, seed, lambda text: print(text, flush=True))
    try:
        churn.play()
    except (ChurnFailed, LocalMarketError) as error:
        print(f"FAILED: {error}")
        return 1
    else:
        shutil.rmtree(root)
    finally:
        record = {
            "command": f"python -m tests.chaos --kills {options.kills} --seed {seed}",
            **churn.result.record(),
        }
        print(json.dumps(record, indent=2))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
