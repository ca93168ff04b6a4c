"""Drafts a sublet.yaml for a folder by what lies in it. Reads a few files, runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = ("train.py", "finetune.py", "fine_tune.py", "main.py", "run.py")
"""in this order; else the only Python file at the top"""
MAX_READ_BYTES = 256 * 1024
_FOLDERS = re.compile(
    r"""["'](?:\./)?((?:ckpts?|checkpoints?|outputs?|out|results?|runs|models?|logs)(?:/[\w.-]+)?)/?["']"""
)
_CHECKPOINT = re.compile(r"ckpt|checkpoint")
_FROM = re.compile(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)", re.IGNORECASE | re.MULTILINE)
_TORCH = re.compile(
    r"^\s*(?:import|from)\s+(?:torch|transformers|lightning|accelerate)\b|^torch\b", re.M
)


@dataclass(frozen=True)
class Draft:
    """What a folder looks like to somebody who reads it for a minute."""

    command: str
    why_command: str
    """"" where the folder leaves no doubt"""
    image: str
    why_image: str
    checkpoint: str = ""
    """the folder that the script seems to save to; "": none was seen"""
    saves_by_itself: str = ""
    """the framework whose checkpoints are recognised without any option"""

    def text(self) -> str:
        """Return the file."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield "# How to run what lies in this folder:  sublet run -f sublet.yaml"
        yield "# All options: sublet run --help. What the command line says counts more than this."
        yield ""
        yield f"image: {self.image}  # {self.why_image}"
        yield f"command: {self.command}" + (f"  # {self.why_command}" if self.why_command else "")
        yield "code: .  # without what .gitignore and .subletignore leave out"
        yield ""
        yield "max_price: 0.50  # credits for a GPU and hour, at the most"
        yield "budget: 5  # credits in all; at its edge the job is saved and paused, not killed"
        yield "gpus: 1  # or 1x24GB, A100:2, cpu"
        yield ""
        if self.saves_by_itself:
            yield f"# What {self.saves_by_itself} saves below `outputs` is recognised as it is."
            yield f"outputs: {self.checkpoint or 'outputs'}"
        elif self.checkpoint:
            yield "checkpoint: " + self.checkpoint + "  # saved while it runs, put back on resume"
        else:
            yield "# checkpoint: checkpoints  # the folder that it saves to and resumes from"
        yield ""
        yield "# env:"
        yield "#   SEED: ${SEED:-17}"
        yield "# profiles:  # sublet run -f sublet.yaml --job-profile big"
        yield "#   big: {gpus: 8x80GB, budget: 100}"


def draft(folder: Path) -> Draft:
    """Look at a folder. Raises OSError."""
    script = _script(folder)
    text = _read(folder / script) if script else ""
    needs = _read(folder / "requirements.txt")
    image, why = _image(folder, f"{text}\n{needs}")
    found = [match.group(1).split("/")[0] for match in _FOLDERS.finditer(text)]
    saved = sorted(found, key=lambda name: not _CHECKPOINT.search(name))
    framework = _framework(text)
    return Draft(
        command=f"python {script or 'train.py'}",
        why_command="" if script else "nothing here is called so: name your script",
        image=image,
        why_image=why,
        checkpoint=saved[0] if saved else "",
        saves_by_itself=framework,
    )


def _script(folder: Path) -> str:
    for name in SCRIPTS:
        if (folder / name).is_file():
            return name
    found = sorted(path.name for path in folder.glob("*.py"))
    return found[0] if len(found) == 1 else ""


def _image(folder: Path, text: str) -> tuple[str, str]:
    bases = _FROM.findall(_read(folder / "Dockerfile"))
    if bases and "$" not in bases[-1] and bases[-1] != "scratch":
        return bases[-1], "what the Dockerfile here begins with"
    if _TORCH.search(text):
        return "pytorch/pytorch:latest", "it needs torch; by digest it stays the same for ever"
    return "python:3.11", "nothing says which; by digest it stays the same for ever"


def _framework(text: str) -> str:
    if re.search(r"\b(?:Seq2Seq|SFT|DPO)?Trainer\(", text) and "transformers" in text:
        return "the Trainer"
    return (
        "Lightning"
        if re.search(r"^\s*(?:import|from)\s+(?:pytorch_)?lightning", text, re.M)
        else ""
    )


def _read(path: Path) -> str:
    """Return the beginning of a file; "" if there is none."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_READ_BYTES).decode(errors="replace")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return ""
