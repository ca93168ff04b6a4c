"""One line for each framework, inside a job: saved when it's due, and stopped when it's asked to.

The agent puts this file beside `sublet_ckpt.py` into every container: `import sublet_frameworks`,
or `from sublet import frameworks`. The standard library and the helper (ckpt_helper.py) only; each
framework is imported by the function that is for it. Python 3.8 and newer.

In place of a recognised folder, for who wants to lose nothing on a reclaim: these save when the
agent asks, and leave with exit code 75 once that is safe. `every` is in steps; 0: only when asked.

    step, state = frameworks.load_torch() or (0, None)        # torch, PEFT: any loop
    frameworks.save_torch(step, {"model": ..., "optimizer": ...}, every=100)

    step = frameworks.load_accelerate(accelerator)            # Accelerate, diffusers
    frameworks.save_accelerate(accelerator, step, every=100)

    trainer = Trainer(callbacks=[frameworks.lightning_callback()])
    trainer.fit(model, ckpt_path=frameworks.lightning_path())

    model.fit(..., callbacks=[frameworks.keras_callback()])

    step, state = frameworks.load_jax(state)                  # JAX, by Orbax
    frameworks.save_jax(step, state, every=100)

The Trainer of Hugging Face: ckpt.TrainerCallback().
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping  # noqa: UP035  (as Python 3.8 knows them)

# In a container the helper is a module of its own; there must be only one of it in a process.
_INSIDE = not __name__.startswith("sublet_contracts.")
ckpt: Any = importlib.import_module("sublet_ckpt" if _INSIDE else "sublet_contracts.ckpt_helper")

__all__ = [
    "keras_callback",
    "lightning_callback",
    "lightning_path",
    "load_accelerate",
    "load_jax",
    "load_torch",
    "save_accelerate",
    "save_if_due",
    "save_jax",
    "save_torch",
]

_TORCH, _LIGHTNING, _ORBAX = "state.pt", "last.ckpt", "state"
_KERAS = ("latest.weights.h5", "training_metadata.json")


def save_if_due(
    step: int,
    write: Callable[[Path], object],
    *,
    every: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> bool:
    """Call this after each step: it saves where that is due, by `write(folder)`, and leaves with
    exit code 75 where the job is asked to stop. Return whether it has saved."""
    stop = ckpt.should_stop()
    due = stop or ckpt.should_save() or (every > 0 and step % every == 0)
    if due:
        ckpt.save(step, write, meta=meta)
    if stop:
        ckpt.exit_preempted()
    return bool(due)


# -- torch, PEFT ---------------------------------------------------------------------------------


def save_torch(step: int, state: Any, *, every: int = 0) -> bool:
    """Save whatever `torch.save` can, where it's due. Return whether it was."""
    import torch

    return save_if_due(step, lambda folder: torch.save(state, str(folder / _TORCH)), every=every)


def load_torch(map_location: Any = "cpu", *, weights_only: bool = True) -> tuple[int, Any] | None:
    """Return the step and the state to go on from; None: begin."""
    restored = ckpt.restore()
    if restored is None:
        return None
    import torch

    path = str(_there(restored / _TORCH, "save_torch"))
    state = torch.load(path, map_location=map_location, weights_only=weights_only)
    return restored.step, state


# -- Accelerate, diffusers -----------------------------------------------------------------------


def save_accelerate(accelerator: Any, step: int, *, every: int = 0) -> bool:
    """Save all that the accelerator has prepared, where it's due. Return whether it was."""
    if accelerator.num_processes > 1:
        raise ckpt.CheckpointError(
            "save_accelerate is for one process; with several let save_state write below the "
            "outputs folder, where it is recognised"
        )

    def write(folder: Path) -> None:
        project = accelerator.project_configuration
        # Else it would write into a folder of its own choice.
        named, project.automatic_checkpoint_naming = project.automatic_checkpoint_naming, False
        try:
            accelerator.save_state(str(folder))
        finally:
            project.automatic_checkpoint_naming = named

    return save_if_due(step, write, every=every)


def load_accelerate(accelerator: Any) -> int:
    """Load what was saved, after `prepare`, and return its step; 0: begin."""
    restored = ckpt.restore()
    if restored is None:
        return 0
    accelerator.load_state(str(restored.path))
    return int(restored.step)


# -- Lightning -----------------------------------------------------------------------------------


def lightning_path() -> str | None:
    """Return what `trainer.fit(ckpt_path=...)` wants: a file, or None."""
    restored = ckpt.restore()
    return None if restored is None else str(_there(restored / _LIGHTNING, "lightning_callback"))


def lightning_callback(every: int = 0) -> Any:
    """Return a callback for Lightning's Trainer."""
    base = _callback_of("lightning.pytorch", "pytorch_lightning")

    class SubletCallback(base):  # type: ignore[misc, valid-type, unused-ignore]
        def on_train_batch_end(self, trainer: Any, *others: Any, **named: Any) -> None:
            step = trainer.global_step
            ckpt.progress(step, trainer.max_steps if trainer.max_steps > 0 else None)
            save_if_due(
                step, lambda folder: trainer.save_checkpoint(str(folder / _LIGHTNING)), every=every
            )

    return SubletCallback()


def _callback_of(*modules: str) -> Any:
    for name in modules:
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            missing = error
    raise missing


# -- Keras ---------------------------------------------------------------------------------------


def keras_callback() -> Any:
    """Return a callback for `fit`: Keras' own BackupAndRestore, whose epochs become checkpoints."""
    import keras

    restored = ckpt.restore()
    backup = tempfile.mkdtemp(prefix="sublet-keras-")
    for name in _KERAS if restored is not None else ():
        shutil.copy(str(_there(restored / name, "keras_callback")), os.path.join(backup, name))

    class SubletCallback(keras.callbacks.BackupAndRestore):  # type: ignore[misc, unused-ignore]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            super().on_epoch_end(epoch, logs)
            done = epoch + 1
            total = self.params.get("epochs")
            ckpt.progress(done, total)
            # The last epoch is finished, not preempted.
            stop = ckpt.should_stop() and done != total
            ckpt.save(done, {name: os.path.join(backup, name) for name in _KERAS})
            if stop:
                ckpt.exit_preempted()

    return SubletCallback(backup)


# -- JAX -----------------------------------------------------------------------------------------


def save_jax(step: int, state: Any, *, every: int = 0) -> bool:
    """Save a tree of arrays by Orbax, where it's due. Return whether it was."""
    import orbax.checkpoint as ocp

    def write(folder: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(str(folder / _ORBAX)), state)

    return save_if_due(step, write, every=every)


def load_jax(like: Any) -> tuple[int, Any]:
    """Return the step and the tree to go on from, of the shape of `like`; 0 and that: begin."""
    restored = ckpt.restore()
    if restored is None:
        return 0, like
    import orbax.checkpoint as ocp

    path = os.path.abspath(str(_there(restored / _ORBAX, "save_jax")))
    with ocp.StandardCheckpointer() as checkpointer:
        return restored.step, checkpointer.restore(path, like)


def _there(path: Path, by: str) -> Path:
    if not path.exists():
        raise ckpt.CheckpointError(f"{path} is missing: the checkpoint wasn't saved by {by}")
    return path
