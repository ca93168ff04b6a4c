"""The two jobs that the demo can run: the real fine-tuning, and the quick one in numpy."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sublet.demo.data import movie_snippets

if TYPE_CHECKING:
    from sublet.client import Client, Job

SCRIPTS = Path(__file__).resolve().parent.parent
MAX_PRICE = 0.60
BUDGET = 2


@dataclass(frozen=True)
class Plan:
    """One job for the demo, and how to tell that it went well."""

    title: str
    patience: str
    interval_steps: int
    same_files: tuple[str, ...]
    """Outputs that must equal the undisturbed run's."""
    inputs: Mapping[str, str]
    """Local path -> path in the container: what the undisturbed run is given too."""
    submit: Callable[["Client", str], "Job"]
    """Submit through this client, in this image."""
    broker_arguments: tuple[str, ...] = ()


def finetune_plan(cache: Path) -> Plan:
    """LoRA on MiniLM with the rated movie snippets. Raises DataUnavailable."""
    from sublet.finetuning import finetune

    data = movie_snippets(cache)

    def submit(client: "Client", image: str) -> "Job":
        return finetune(
            "minilm",
            data,
            max_price=MAX_PRICE,
            budget=BUDGET,
            max_steps=60,
            checkpoint_steps=10,
            eval_rows=400,
            gpus="cpu",
            image=image,
            name="movie-reviews",
            client=client,
            memory="4GB",
            disk="2GB",
            cpus=1,
        )

    return Plan(
        title="LoRA on MiniLM, 10,605 rated movie snippets",
        patience="20s",
        interval_steps=10,
        same_files=("adapter/adapter_model.safetensors", "loss.csv"),
        inputs={str(SCRIPTS / "finetuning"): "/job", str(data): f"/data/{data.name}"},
        submit=submit,
    )


def quick_plan() -> Plan:
    """A character model in numpy, with a market that is quick to call a machine lost."""
    script = SCRIPTS / "demo" / "quick.py"

    def submit(client: "Client", image: str) -> "Job":
        return client.run(
            image=image,
            command=["python3", "/job/quick.py", "--out", "/out"],
            gpus="cpu",
            max_price=MAX_PRICE,
            budget=BUDGET,
            patience="5s",
            inputs={str(script): "/job/quick.py"},
            outputs="/out",
            name="quick",
            memory="1GB",
            disk="1GB",
            cpus=1,
        )

    return Plan(
        title="a character model in numpy",
        patience="5s",
        interval_steps=5,
        same_files=("model.bin", "loss.csv"),
        inputs={str(script): "/job/quick.py"},
        submit=submit,
        broker_arguments=("--heartbeat-ms", "1000", "--unknown-after-ms", "2500"),
    )


def find_image(quick: bool, wanted: str, say: Callable[[str], None]) -> tuple[str, str, str]:
    """Return (runner, image, why): Docker where an Engine answers and an image can be had.

    `wanted` is auto, docker or process. Raises RuntimeError if docker is wanted and can't be had.
    """
    if wanted == "process":
        return "process", "local/python", "asked for"
    if wanted == "auto" and quick:
        return "process", "local/python", "an image would take longer than the quick demo"
    builder = Path(__file__).resolve().parents[3] / "deploy" / "images" / "finetune"
    if not (builder / "build.py").is_file():
        why = "deploy/images is not beside this installation; use a checkout for Docker"
    else:
        sys.path.insert(0, str(builder))
        try:
            # By name: it lies in deploy/, beside the packages and not in one.
            return "docker", str(import_module("build").ensure_image(say)), ""
        except (RuntimeError, OSError) as error:
            why = str(error).splitlines()[0]
        finally:
            sys.path.remove(str(builder))
    if wanted == "docker":
        raise RuntimeError(f"Docker was asked for, and no image can be had: {why}")
    return "process", "local/python", why
