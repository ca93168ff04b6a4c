"""What to add to a script so that it can be resumed, by the file that it saves: one line for each
framework.

A running job's renter is told which file it seems to save its state to (`about`). What that is
called says which framework wrote it, and why nothing could be resumed from it.
"""

import re

_WEIGHTS = r"(?:model|pytorch_model|adapter_model)(?:-[0-9]{5}-of-[0-9]{5})?\.(?:safetensors|bin)"

_BY_FILE: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(rf"(?:.*/)?checkpoint-[0-9]+/{_WEIGHTS}"),
        "the Trainer of Hugging Face: leave out save_only_model, and start by "
        "train(resume_from_checkpoint=get_last_checkpoint(output_dir))",
    ),
    (
        re.compile(r"(?:.*/)?adapter_model\.(?:safetensors|bin)"),
        "PEFT: an adapter alone is nothing to resume from; also "
        'torch.save({"model": get_peft_model_state_dict(model), "optimizer": '
        'optimizer.state_dict(), "step": step}, path) into a folder of the outputs',
    ),
    (
        re.compile(
            r"(?:.*/)?(?:diffusion_pytorch_model.*|pytorch_lora_weights)\.(?:safetensors|bin)"
        ),
        "diffusers: run its script with --checkpointing_steps and --resume_from_checkpoint latest",
    ),
    (
        re.compile(rf"(?:.*/)?{_WEIGHTS}"),
        "Accelerate: accelerator.save_state(folder), and at the start "
        "accelerator.load_state(folder)",
    ),
    (
        re.compile(r".*\.ckpt"),
        "Lightning: ModelCheckpoint(dirpath, save_last=True) without save_weights_only, and "
        'fit(ckpt_path="last")',
    ),
    (
        re.compile(r".*\.(?:keras|weights\.h5|h5|hdf5)"),
        "Keras: fit(callbacks=[keras.callbacks.BackupAndRestore(folder)])",
    ),
    (
        re.compile(r".*\.(?:msgpack|eqx|orbax)|.*\.orbax-checkpoint-tmp.*|(?:.*/)?manifest\.ocdbt"),
        "JAX: orbax.checkpoint.CheckpointManager(folder): save(step, args=StandardSave(state)), "
        "and restore(latest_step()) at the start",
    ),
    (
        re.compile(r".*\.(?:pt|pth|tar)"),
        'torch: save {"model": ..., "optimizer": optimizer.state_dict(), "step": step} in one '
        "file, and load it at the start",
    ),
)


def addition_for(path: str) -> str:
    """Return what to add to the script that wrote such a file; '' if its name says nothing."""
    return next((line for pattern, line in _BY_FILE if pattern.fullmatch(path)), "")
