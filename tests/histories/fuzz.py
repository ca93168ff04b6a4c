"""Fuzz the parsers of hostile bytes, guided by coverage (atheris, libFuzzer).

    python -m tests.histories.fuzz [--seconds N] [--inputs N] [--seed N] [TARGET...]
    python -m tests.histories.fuzz --replay TARGET HEX

One process for each target, one after the other. Seeds are made anew by our own code. A crash
prints the input as hex and the command that replays it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_INPUT_BYTES = 16 * 1024
ONE_INPUT_S = 20
"""libFuzzer's own limit: an input that takes longer is a finding (quadratic parsing, say)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz what the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.histories.fuzz", description="fuzz the parsers of hostile bytes"
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="default: all; `every`: all in one"
    )
    parser.add_argument("--seconds", type=int, default=30, help="per target (default: 30)")
    parser.add_argument("--inputs", type=int, default=0, help="stop a target after so many")
    parser.add_argument("--seed", type=int, default=0, help="libFuzzer's; 0: a fresh one")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "HEX"), help="run one input")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.replay:
        return _replay(*chosen.replay)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (Linux on x86-64 only): pip install 'sublet[dev]'")
        return 2
    if chosen.child:
        _child(chosen.child, chosen.corpus, chosen.seconds, chosen.inputs, chosen.seed)
    from tests.histories.targets import TARGETS

    unknown = [name for name in chosen.targets if name not in {*TARGETS, "every"}]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    failed = []
    for name in chosen.targets or TARGETS:
        if not fuzz(name, seconds=chosen.seconds, inputs=chosen.inputs, seed=chosen.seed):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no target failed")
    return 1 if failed else 0


def fuzz(name: str, *, seconds: int, inputs: int = 0, seed: int = 0) -> bool:
    """Fuzz one target in a process of its own. Return whether nothing was found."""
    from tests.histories.targets import named

    with tempfile.TemporaryDirectory(prefix="sublet-fuzz-") as corpus:
        for number, data in enumerate(named(name).seeds()):
            Path(corpus, f"seed-{number:04d}").write_bytes(data)
        arguments = [
            sys.executable,
            "-m",
            "tests.histories.fuzz",
            "--child",
            name,
            "--corpus",
            corpus,
            "--seconds",
            str(seconds),
            "--inputs",
            str(inputs),
            "--seed",
            str(seed),
        ]
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("Done ") or " DONE " in line]
    print(f"{name}: {'; '.join(line.strip() for line in told) or 'ended early'}", flush=True)
    if done.returncode != 0:
        print("\n".join(lines[-60:]), flush=True)
    return done.returncode == 0


def _child(name: str, corpus: str, seconds: int, inputs: int, seed: int) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(
        include=["sublet_contracts", "sublet_agent", "sublet_broker", "json"]
    ):
        from tests.histories.targets import named
    target = named(name)

    def one_input(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            print(found(name, data), flush=True)
            raise

    options = [
        sys.argv[0],
        corpus,
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={ONE_INPUT_S}",
        f"-artifact_prefix={corpus}/",
        "-rss_limit_mb=3072",
    ]
    options += [f"-runs={inputs}"] if inputs else []
    options += [f"-seed={seed}"] if seed else []
    atheris.Setup(options, one_input)
    atheris.Fuzz()


def found(name: str, data: bytes) -> str:
    """Say which input it was, and how to run it again."""
    return (
        f"== {name} fails on {len(data)} bytes: {data.hex()}\n"
        f"== again: python -m tests.histories.fuzz --replay {name} {data.hex() or repr('')}"
    )


def _replay(name: str, text: str) -> int:
    from tests.histories.targets import named

    try:
        named(name).run(bytes.fromhex(text))
    except BaseException:
        print(f"{name} fails:", file=sys.stderr)
        raise
    print("it passes")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
