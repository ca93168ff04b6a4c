"""Which checkpoints of HF Trainer and Lightning are whole, and where they go at restore."""

import pytest

from sublet_contracts.checkpoint_layouts import (
    FoundCheckpoint,
    ListedFile,
    find_checkpoints,
    packed,
    placement,
)

NOW_MS = 1_000_000
QUIET_MS = 2_000
HF = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def listed(*paths: str, mtime_ms: int = NOW_MS - 10_000, size_bytes: int = 7) -> list[ListedFile]:
    return [ListedFile(path, size_bytes, mtime_ms) for path in paths]


def folder(step: int, names: tuple[str, ...] = HF, root: str = "") -> list[ListedFile]:
    return listed(*(f"{root}checkpoint-{step}/{name}" for name in names))


def found(listing: list[ListedFile], after_step: int = 0) -> list[FoundCheckpoint]:
    return find_checkpoints(listing, NOW_MS, after_step=after_step, quiet_ms=QUIET_MS)


def test_trainer_checkpoints_are_found_by_step_and_with_all_their_files() -> None:
    listing = [*folder(100), *folder(20, root="run/"), *listed("loss.csv", "checkpoints.txt")]
    first, second = found(listing)
    assert (first.step, second.step) == (20, 100)
    assert first.framework == "hf-trainer"
    assert not first.step_is_counted
    assert {file.path for file in first.files} == {f"run/checkpoint-20/{n}" for n in HF}
    assert first.total_bytes == 7 * len(HF)


@pytest.mark.parametrize("absent", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_trainer_checkpoint_in_the_making_is_not_whole(absent: str) -> None:
    assert found(folder(20, tuple(name for name in HF if name != absent))) == []


def test_an_empty_trainer_state_is_not_whole() -> None:
    rest = tuple(name for name in HF if name != "trainer_state.json")
    assert found([*folder(5, rest), ListedFile("checkpoint-5/trainer_state.json", 0, 0)]) == []


@pytest.mark.parametrize(
    "weights",
    [
        ("adapter_model.safetensors",),
        ("pytorch_model.bin",),
        ("other/adapter_model.safetensors",),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ],
)
def test_weights_come_in_several_shapes(weights: tuple[str, ...]) -> None:
    assert [c.step for c in found(folder(5, (*HF[1:], *weights)))] == [5]


@pytest.mark.parametrize(
    "weights",
    [
        ("model-00001-of-00002.safetensors",),
        ("model-00001-of-00002.safetensors", "model-00002-of-00003.safetensors"),
    ],
)
def test_every_promised_shard_must_be_there(weights: tuple[str, ...]) -> None:
    assert found(folder(5, (*HF[1:], *weights))) == []


def test_deepspeed_keeps_its_state_deeper() -> None:
    names = (
        "trainer_state.json",
        "global_step9/mp_rank_00_model_states.pt",
        "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    assert [c.step for c in found(folder(9, names))] == [9]


@pytest.mark.parametrize("name", ["checkpoint-020", "checkpoint-", "tmp-checkpoint-20", "step-20"])
def test_other_folders_are_left_alone(name: str) -> None:
    assert found(listed(*(f"{name}/{file}" for file in HF))) == []


def test_nothing_is_whole_before_it_is_quiet() -> None:
    young = ListedFile("checkpoint-20/optimizer.pt", 7, NOW_MS - QUIET_MS + 1)
    listing = [file for file in folder(20) if file.path != young.path]
    assert found([*listing, young]) == []
    old = ListedFile(young.path, 7, NOW_MS - QUIET_MS)
    assert [c.step for c in found([*listing, old])] == [20]


def test_steps_that_are_durable_already_are_not_found_again() -> None:
    assert [c.step for c in found([*folder(20), *folder(40)], after_step=20)] == [40]


def test_lightning_says_the_step_in_the_name() -> None:
    listing = listed("logs/epoch=0-step=50.ckpt", "logs/epoch=1-step=100-v1.ckpt", "logs/last.ckpt")
    first, second = found(listing)
    assert (first.framework, first.step, second.step) == ("lightning", 50, 100)
    assert [file.path for file in first.files] == ["logs/epoch=0-step=50.ckpt"]
    # What ckpt_path="last" looks for goes along with the newest.
    assert [f.path for f in second.files] == ["logs/epoch=1-step=100-v1.ckpt", "logs/last.ckpt"]


def test_lightning_files_without_a_step_are_counted() -> None:
    older = listed("a.ckpt", mtime_ms=NOW_MS - 20_000)
    newer = listed("last.ckpt", mtime_ms=NOW_MS - 9_000)
    (one,) = found([*older, *newer], after_step=3)
    assert (one.step, one.step_is_counted) == (4, True)
    assert [file.path for file in one.files] == ["last.ckpt"]
    again = find_checkpoints([*older, *newer], NOW_MS, after_step=4, after_mtime_ms=one.mtime_ms)
    assert again == []


def test_an_empty_lightning_file_is_not_whole() -> None:
    assert found(listed("epoch=0-step=50.ckpt", size_bytes=0)) == []


def test_a_packed_checkpoint_goes_back_to_where_it_was() -> None:
    (checkpoint,) = found(folder(20, root="run/"))
    names = [packed(file.path) for file in checkpoint.files]
    assert set(placement(names).values()) == {file.path for file in checkpoint.files}
    assert placement(["state.json", "DONE", "outputs-layouts/x"]) == {}
