"""sublet: run containers on idle GPUs, resumed elsewhere when a machine goes.

    import sublet

    job = sublet.run(image="...", command=["python", "train.py"], gpus="1x24GB", max_price=0.40,
                     budget=5, outputs="/out")
    job.follow()
    job.download("out/")

Nothing heavy is imported until it's used: `import sublet` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sublet import aio as aio
    from sublet import ckpt as ckpt
    from sublet.client import Client as Client
    from sublet.client import Job as Job
    from sublet.errors import SubletError as SubletError
    from sublet.finetuning import finetune as finetune
    from sublet.job_file import read_job_file as read_job_file
    from sublet.running import run as run

_HOMES = {
    "Client": "sublet.client",
    "Job": "sublet.client",
    "SubletError": "sublet.errors",
    "finetune": "sublet.finetuning",
    "read_job_file": "sublet.job_file",
    "run": "sublet.running",
}

__all__ = ["Client", "Job", "SubletError", "aio", "ckpt", "finetune", "read_job_file", "run"]


def __getattr__(name: str) -> Any:
    if name in ("aio", "ckpt"):
        return import_module(f"sublet.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sublet' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
