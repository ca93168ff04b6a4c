"""What the frameworks themselves write, at each moment of a run: nothing half-written is taken.

Real scripts run with the real libraries, and what their folder held is kept each time something
was written (`tests/e2e/watched.py`). If the run had been killed at any of these moments, the agent
would take what the script had wholly saved, or nothing; with its newest file cut in half as well.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace.folder_watch import FolderWatch, Wish
from tests.agent.written_states import JUST_NOW_S, State, assert_only_whole, run_watched
from tests.services import require

RUNS: dict[str, tuple[list[str], int]] = {
    "torch": (["torch_in_place.py", "5", "0"], 5),
    "trainer": (["trainer_blog.py", "every"], 1),  # it keeps all, and prints at its end only
    "accelerate": (["accelerate_loop.py", "FOLDER", "22", "0"], 4),
    "diffusers": (["diffusers_unet.py", "--output_dir", "FOLDER", "--max_train_steps", "16"], 3),
    "lightning": (["lightning_fit.py", "FOLDER", "16", "0"], 3),
    "keras": (["keras_fit.py", "FOLDER", "4", "0"], 4),
    "orbax": (["orbax_loop.py", "FOLDER", "16", "0.4"], 4),  # it saves beside the loop
}
"""how each is run, and how many checkpoints it saves"""
NO_ORBAX = find_spec("orbax") is None or find_spec("jax") is None
BY_HAND = "JAX is too large for every environment: pip install 'jax[cpu]' orbax-checkpoint optax"


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework",
    [
        *(name for name in RUNS if name != "orbax"),
        pytest.param("orbax", marks=pytest.mark.skipif(NO_ORBAX, reason=BY_HAND)),
    ],
)
def test_only_what_a_framework_has_wholly_saved_is_taken(framework: str, tmp_path: Path) -> None:
    require("torch" if framework == "torch" else "frameworks")
    command, count = RUNS[framework]
    states = run_watched(tmp_path, *command)
    saved = assert_only_whole(states, tmp_path / "aside")
    # The last of a script that deletes its checkpoints at its end is missing among those at rest.
    assert count - 1 <= len(saved) <= count
    if framework != "orbax":  # what it writes is none of the formats that say where they end
        assert_folders_hold_only_whole(states, saved)


def assert_folders_hold_only_whole(states: list[State], saved: list[dict[str, str]]) -> None:
    """Assert the same where the folder is named by --checkpoint: it is saved as it is."""
    ready = 0
    for state in states:
        newest = state.taken(JUST_NOW_S)
        top = os.open(state.folder, os.O_RDONLY)
        try:
            seen = FolderWatch().look([top], Wish(ended="killed"))
        finally:
            os.close(top)
        if seen.state != "ready" or newest is None:
            assert state.folder.name.endswith(".rest") or seen.state != "ready" or not newest
            continue
        ready += 1
        assert {file.path for file in seen.files} >= set(newest), state.folder
    assert ready >= len(saved) - 1
