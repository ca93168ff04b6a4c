"""Which checkpoints of HF Trainer and Lightning are whole, and what the next snapshot is."""

import json

import pytest

from sublet_contracts.checkpoint_layouts import (
    Snapshot,
    TrainerState,
    next_snapshot,
    placed,
    read_record,
    read_trainer_state,
)
from sublet_contracts.framework_layouts import FoundCheckpoint, ListedFile, find_checkpoints

HF = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def listed(*paths: str, mtime_ms: int = 1000, size_bytes: int = 7) -> list[ListedFile]:
    return [ListedFile(path=path, size_bytes=size_bytes, mtime_ms=mtime_ms) for path in paths]


def folder(
    step: int, names: tuple[str, ...] = HF, root: str = "", mtime_ms: int | None = None
) -> list[ListedFile]:
    at = 1000 * step if mtime_ms is None else mtime_ms
    return listed(*(f"{root}checkpoint-{step}/{name}" for name in names), mtime_ms=at)


def found(listing: list[ListedFile]) -> list[FoundCheckpoint]:
    return find_checkpoints(listing)


def snapshot(
    listing: list[ListedFile],
    last: Snapshot | None = None,
    after_step: int = 0,
    **states: TrainerState,
) -> Snapshot | None:
    said = {path.replace("__", "/") + "/trainer_state.json": s for path, s in states.items()}
    return next_snapshot(find_checkpoints(listing), said, last, after_step)


def paths(taken: Snapshot | None) -> set[str]:
    assert taken is not None
    return {file.path for file in taken.files}


def test_trainer_checkpoints_are_found_by_step_and_with_all_their_files() -> None:
    listing = [*folder(100), *folder(20, root="run/"), *listed("loss.csv", "checkpoints.txt")]
    second, first = found(listing)
    assert (first.step, second.step) == (20, 100)
    assert (first.framework, first.folder) == ("hf-trainer", "run")
    assert {file.path for file in first.files} == {f"run/checkpoint-20/{n}" for n in HF}
    assert first.state_path == "run/checkpoint-20/trainer_state.json"


@pytest.mark.parametrize("absent", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_trainer_checkpoint_in_the_making_is_not_whole(absent: str) -> None:
    assert found(folder(20, tuple(name for name in HF if name != absent))) == []


def test_an_empty_trainer_state_is_not_whole() -> None:
    rest = tuple(name for name in HF if name != "trainer_state.json")
    assert found([*folder(5, rest), *listed("checkpoint-5/trainer_state.json", size_bytes=0)]) == []


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


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"global_step": 20, "max_st',
        b'{"global_step": 19}',
        b"[20]",
        b'{"global_step": true}',
        b"[" * 100_000,
        b'{"global_step": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_torn_or_foreign_trainer_state_is_not_read(data: bytes) -> None:
    assert read_trainer_state(data, 20) is None


@pytest.mark.parametrize(
    "best",
    [{"best_global_step": 10}, {"best_model_checkpoint": "/out/checkpoint-10"}],
)
def test_a_trainer_state_says_where_it_ends_and_what_was_best(best: dict[str, object]) -> None:
    said = {"global_step": 20, "max_steps": 60, "log_history": [{"loss": float("nan")}], **best}
    assert read_trainer_state(json.dumps(said).encode(), 20) == TrainerState(20, 60, 10)


def test_the_newest_checkpoint_is_taken_once() -> None:
    first = snapshot([*folder(20), *folder(40)])
    assert first is not None
    assert first.step == 40
    assert paths(first) == {file.path for file in folder(40)}
    assert snapshot([*folder(20), *folder(40)], first) is None
    second = snapshot([*folder(40), *folder(60)], first)
    assert second is not None
    assert second.step == 60


def test_the_best_checkpoint_goes_along() -> None:
    state = TrainerState(40, 60, 10)
    taken = snapshot([*folder(10), *folder(20), *folder(40)], **{"checkpoint-40": state})
    assert paths(taken) == {file.path for file in [*folder(10), *folder(40)]}
    assert taken is not None
    assert (taken.trained_step, taken.total_steps, taken.finished) == (40, 60, False)


def test_a_second_model_goes_on_counting_and_the_first_goes_along() -> None:
    first = snapshot(folder(100, root="a/"))
    listing = [*folder(100, root="a/"), *folder(20, root="b/", mtime_ms=200_000)]
    second = snapshot(listing, first)
    assert second is not None
    assert second.step == 101
    assert paths(second) == {file.path for file in listing}
    third = snapshot([*listing, *folder(120, root="b/", mtime_ms=300_000)], second)
    assert third is not None
    assert third.step == 120


def test_lightning_says_the_step_in_the_name() -> None:
    listing = [*listed("logs/epoch=0-step=50.ckpt", mtime_ms=1000)]
    listing += listed("logs/epoch=1-step=100-v1.ckpt", "logs/last.ckpt", mtime_ms=2000)
    taken = snapshot(listing)
    assert taken is not None
    assert taken.step == 100
    assert paths(taken) == {file.path for file in listing}


def test_lightning_files_without_a_step_are_counted() -> None:
    first = snapshot(listed("last.ckpt", mtime_ms=1000), after_step=3)
    assert first is not None
    assert first.step == 4
    assert snapshot(listed("last.ckpt", mtime_ms=1000), first, after_step=4) is None
    second = snapshot(listed("last.ckpt", mtime_ms=5000), first, after_step=4)
    assert second is not None
    assert second.step == 5


def test_a_last_that_is_newer_than_the_best_counts_on() -> None:
    """save_top_k=1 with a metric: the best stays at step 50 while last.ckpt goes on."""
    best = listed("epoch=0-step=50.ckpt", mtime_ms=1000)
    first = snapshot([*best, *listed("last.ckpt", mtime_ms=1001)])
    second = snapshot([*best, *listed("last.ckpt", mtime_ms=9000)], first)
    assert first is not None
    assert second is not None
    assert (first.step, second.step) == (50, 51)


def test_lightning_takes_the_newest_few_along() -> None:
    listing = [f for n in range(1, 30) for f in listed(f"step={n}.ckpt", mtime_ms=n)]
    assert paths(snapshot(listing)) == {f"step={n}.ckpt" for n in range(25, 30)}


def test_an_empty_lightning_file_is_not_whole() -> None:
    assert found(listed("epoch=0-step=50.ckpt", size_bytes=0)) == []


def test_a_snapshot_lies_elsewhere_in_the_same_order_and_not_in_the_future() -> None:
    taken = snapshot(
        [*listed("last.ckpt", mtime_ms=900_000), *listed("last-v1.ckpt", mtime_ms=905_000)]
    )
    assert taken is not None
    there = placed(taken, 7, 500_000)
    assert there.step == 7
    assert [(f.path, f.mtime_ms) for f in there.files] == [
        ("last-v1.ckpt", 500_000),
        ("last.ckpt", 495_000),
    ]
    assert snapshot(list(there.files), there, after_step=7) is None


def test_a_record_is_read_as_a_strangers() -> None:
    taken = snapshot(folder(20))
    assert taken is not None
    assert read_record(taken.to_bytes()) == taken
    said = json.loads(taken.to_bytes())
    for path in ("../x", "/x", "a//b"):
        said["files"][0]["path"] = path
        with pytest.raises(ValueError, match=r"outputs-layout\.json"):
            read_record(json.dumps(said).encode())
