"""A line for each framework: a script that is asked to stop saves, leaves, and goes on elsewhere.

Each script runs with the real library, as in a container: with the files that the agent puts there.
It is stopped at its first step, goes on in another folder, and ends with the bytes of a run that
nobody stopped.
"""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from sublet_contracts import ckpt_helper
from sublet_contracts.ckpt_helper_install import frameworks_source, write_helper
from tests.services import require

TORCH = """
    import sys, torch
    import sublet_frameworks as frameworks
    torch.manual_seed(1)
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    step, state = frameworks.load_torch() or (0, None)
    if state:
        net.load_state_dict(state["net"]); optimizer.load_state_dict(state["optimizer"])
    print("starts at", step)
    while step < 6:
        loss = net(torch.full((3, 4), float(step))).pow(2).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        step += 1
        frameworks.save_torch(
            step, {"net": net.state_dict(), "optimizer": optimizer.state_dict()}, every=2
        )
    sys.stdout.write(repr([p.tolist() for p in net.parameters()]))
"""
ACCELERATE = """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed
    from sublet import frameworks
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(project_dir=".", automatic_checkpoint_naming=True),
    )
    set_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    step = frameworks.load_accelerate(accelerator)
    print("starts at", step)
    while step < 6:
        loss = net(torch.randn(3, 4)).pow(2).mean()
        optimizer.zero_grad(); accelerator.backward(loss); optimizer.step()
        step += 1
        frameworks.save_accelerate(accelerator, step, every=4)
    print([p.tolist() for p in net.parameters()], end="")
"""
LIGHTNING = """
    import lightning, torch
    from sublet import frameworks
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 2)
        def training_step(self, batch, index):
            return self.inner(batch[0]).pow(2).mean()
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())
    lightning.seed_everything(1)
    net, path = Net(), frameworks.lightning_path()
    print("starts at", 1 if path else 0)
    rows = torch.utils.data.TensorDataset(torch.ones(6, 4))  # all alike: its loader begins anew
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, callbacks=[frameworks.lightning_callback()],
    )
    trainer.fit(net, torch.utils.data.DataLoader(rows, batch_size=1), ckpt_path=path)
    print([p.tolist() for p in net.parameters()], end="")
"""
KERAS = """
    import os
    os.environ["KERAS_BACKEND"] = "torch"
    import keras, numpy
    from sublet import frameworks
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    net.compile(keras.optimizers.Adam(0.01), "mse")
    begun = []
    tell = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    net.fit(
        numpy.ones((6, 4)), numpy.zeros((6, 2)), epochs=4, shuffle=False, verbose=0,
        callbacks=[frameworks.keras_callback(), tell],
    )
    print("starts at", begun[0])
    print([weights.tolist() for weights in net.get_weights()], end="")
"""
JAX = """
    import jax, jax.numpy as jnp
    from sublet import frameworks
    step, state = frameworks.load_jax({"weights": jnp.ones((4, 2)), "key": jnp.zeros((), int)})
    print("starts at", step)
    while step < 6:
        noise = jax.random.normal(jax.random.key(step), (4, 2))
        state = {"weights": state["weights"] * 0.9 + noise, "key": state["key"] + 1}
        step += 1
        frameworks.save_jax(step, state, every=2)
    print(state["weights"].tolist(), end="")
"""
NO_ORBAX = find_spec("orbax") is None or find_spec("jax") is None
BY_HAND = "JAX is too large for every environment: pip install 'jax[cpu]' orbax-checkpoint"


def run(place: Path, checkpoint: Path, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as a job whose checkpoint folder is `checkpoint`."""
    helper = write_helper(place / "helper")
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={
            **os.environ,
            "SUBLET_CHECKPOINT_DIR": str(checkpoint),
            "PYTHONPATH": f"{helper}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
        },
        cwd=place,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(TORCH, id="torch"),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
        pytest.param(LIGHTNING, id="lightning", marks=pytest.mark.slow),
        pytest.param(KERAS, id="keras", marks=pytest.mark.slow),
        pytest.param(
            JAX, id="jax", marks=[pytest.mark.slow, pytest.mark.skipif(NO_ORBAX, reason=BY_HAND)]
        ),
    ],
)
def test_a_script_that_is_asked_to_stop_goes_on_elsewhere(script: str, tmp_path: Path) -> None:
    require("torch" if script is TORCH else "frameworks")
    here, there, alone = tmp_path / "here", tmp_path / "there", tmp_path / "alone"
    for folder in (here, there, alone):
        folder.mkdir()
    (here / "STOP").touch()
    stopped = run(tmp_path, here, script)
    assert stopped.returncode == ckpt_helper.EXIT_PREEMPTED, stopped.stderr
    assert [path.name for path in (here / "out").iterdir()] == ["step-1"]
    shutil.copytree(here / "out" / "step-1", there / "in" / "step-1")
    resumed, undisturbed = run(tmp_path, there, script), run(tmp_path, alone, script)
    assert resumed.returncode == undisturbed.returncode == 0, resumed.stderr + undisturbed.stderr
    assert "starts at 1\n" in resumed.stdout
    assert "starts at 0\n" in undisturbed.stdout
    assert (there / "restored").exists()
    assert resumed.stdout.splitlines()[-1] == undisturbed.stdout.splitlines()[-1]


def test_it_is_one_file_that_old_pythons_read_and_needs_no_framework_to_load() -> None:
    tree = ast.parse(frameworks_source(), feature_version=(3, 8))
    at_top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    at_top |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert at_top - sys.stdlib_module_names == set()
