"""Which checkpoints of each framework are whole by their names and times.

The orders are those that the libraries keep: tests/agent/test_framework_states.py lets them write.
"""

import itertools

import pytest

from sublet_contracts.framework_layouts import (
    FOLDERS,
    FoundCheckpoint,
    ListedFile,
    find_checkpoints,
    in_the_making,
)

ACCELERATE = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
WITH_CUSTOM = (*ACCELERATE, "custom_checkpoint_0.pkl")
DIFFUSERS = (
    "unet_ema/config.json",
    "unet_ema/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
)
KERAS = ("latest.weights.h5", "training_metadata.json")
ORBAX = (
    "_CHECKPOINT_METADATA",
    "default/array_metadatas/process_0",
    "default/ocdbt.process_0/d/e66342d7e9e7533a",
    "default/ocdbt.process_0/manifest.ocdbt",
    "default/_sharding",
    "default/_METADATA",
    "default/d/f323de7063810998",
    "default/manifest.ocdbt",
)


def written(
    names: tuple[str, ...], folder: str = "", at_ms: int = 10_000, step_ms: int = 5
) -> list[ListedFile]:
    """Return files that were written one after the other."""
    return [
        ListedFile(path=f"{folder}{name}", size_bytes=7, mtime_ms=at_ms + step_ms * number)
        for number, name in enumerate(names)
    ]


def kinds(listing: list[ListedFile]) -> list[tuple[str, int | None]]:
    return [(found.framework, found.step) for found in find_checkpoints(listing)]


def begun(listing: list[ListedFile], killed_ms: int | None = None) -> str:
    return in_the_making(((f.path, f.size_bytes, f.mtime_ms) for f in listing), killed_ms)


WHOLE = [
    ("accelerate", 3, "checkpoints/checkpoint_3/", WITH_CUSTOM),
    ("accelerate", 2, "epoch_2/", ACCELERATE),
    ("accelerate", 500, "out/checkpoint-500/", DIFFUSERS),
    ("accelerate", None, "last/", ACCELERATE),
    ("keras", None, "backup/", KERAS),
    ("orbax", 40, "ckpts/40/", ORBAX),
    ("orbax", 40, "ckpts/state_40/", tuple(name.removeprefix("default/") for name in ORBAX)),
    ("torch-distributed", 7, "step_7/", ("__0_0.distcp", "__1_0.distcp", ".metadata")),
]


@pytest.mark.parametrize(("framework", "step", "folder", "names"), WHOLE)
def test_a_whole_checkpoint_is_found_with_all_its_files(
    framework: str, step: int | None, folder: str, names: tuple[str, ...]
) -> None:
    listing = [*written(names, folder), *written(("loss.csv", "notes/loss.csv"))]
    (found,) = find_checkpoints(listing)
    assert (found.framework, found.step) == (framework, step)
    assert {file.path for file in found.files} == {folder + name for name in names}
    assert begun(listing) == ""


@pytest.mark.parametrize(("folder", "names"), [(each[2], each[3]) for each in WHOLE])
def test_a_beginning_of_it_is_not_whole(folder: str, names: tuple[str, ...]) -> None:
    if names is ORBAX or folder == "ckpts/state_40/":
        folder = folder.rstrip("/") + ".orbax-checkpoint-tmp/"  # its end is a rename
    if names[-1].startswith("custom"):
        names = names[:-1]  # with a first one only time tells: see below
    for count in range(len(names)):
        assert kinds(written(names[:count], folder)) == []
    for name in names if "orbax" not in folder else ():
        if name not in ("scheduler.bin", "sampler.bin") and not name.endswith("config.json"):
            empty = [
                file.model_copy(update={"size_bytes": 0}) if file.path == folder + name else file
                for file in written(names, folder)
            ]
            several = sum(n.split("/")[-1] == name.split("/")[-1] for n in names) > 1
            assert kinds(empty) == [] or several or name.startswith("__"), name


def test_what_is_written_anew_in_place_is_whole_with_its_last_file() -> None:
    for names in (KERAS, ACCELERATE):
        before = written(names, "state/", at_ms=1_000)
        assert len(kinds(before)) == 1
        for count in range(1, len(names)):
            anew = [*written(names[:count], "state/", at_ms=1_400), *before[count:]]
            assert kinds(anew) == [], count
            assert "older than what lies beside it" in begun(anew)


def test_a_checkpoint_has_what_the_one_before_it_has() -> None:
    first = written(WITH_CUSTOM, "checkpoints/checkpoint_0/")
    second = written(ACCELERATE, "checkpoints/checkpoint_1/", at_ms=20_000)
    assert kinds([*first, *second]) == [("accelerate", 0)]
    assert "custom_checkpoint_0.pkl" in begun([*first, *second])
    whole = written(WITH_CUSTOM, "checkpoints/checkpoint_1/", at_ms=20_000)
    assert kinds([*first, *whole]) == [("accelerate", 1), ("accelerate", 0)]
    # Of another model that is trained beside it nothing follows.
    elsewhere = written(ACCELERATE, "other/checkpoint_1/", at_ms=20_000)
    assert kinds([*first, *elsewhere]) == [("accelerate", 1), ("accelerate", 0)]


def test_of_a_first_one_only_time_tells_that_no_more_is_to_come() -> None:
    first = written(ACCELERATE, "checkpoint_0/")
    assert [found.must_be_quiet for found in find_checkpoints(first)] == [True]
    second = written(ACCELERATE, "checkpoint_1/", at_ms=20_000)
    newest = find_checkpoints([*first, *second])[0]
    assert (newest.step, newest.must_be_quiet) == (1, False)


@pytest.mark.parametrize(
    ("folder", "names"), [("checkpoint_0/", WITH_CUSTOM), ("checkpoint-5/", DIFFUSERS)]
)
def test_what_was_begun_just_before_a_kill_is_not_taken(
    folder: str, names: tuple[str, ...]
) -> None:
    for count in range(1, len(names) + 1):
        listing = written(names[:count], folder)
        assert begun(listing) == ""  # it may be a script's own, and is still being written
        assert folder.rstrip("/") in begun(listing, killed_ms=10_050)
        assert begun(listing, killed_ms=60_000) == ""
    # Beside one that is whole it is seen while the run lives, too.
    beside = written(names[:2], folder[:-2] + "9/", at_ms=20_000)
    assert "is not there yet" in begun([*written(names, folder), *beside])


def test_a_kill_between_keras_two_files_is_seen() -> None:
    assert "training_metadata.json" in begun(written(KERAS[:1], "backup/"), killed_ms=10_050)
    # Weights alone, as another callback writes them, are nobody's beginning.
    assert begun(written(KERAS[:1], "backup/")) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("adapter_model.safetensors", "adapter_config.json"),  # peft's save_pretrained
        ("config.json", "model.safetensors", "tokenizer.json"),
        ("model.keras",),
        ("epoch_3.weights.h5",),
        ("state.msgpack",),
        ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        ("pytorch_lora_weights.safetensors",),
        ("_METADATA", "manifest.ocdbt", "d/0123"),
        ("model.pt", "optimizer.pt"),  # two files: which of them belong together?
        ("model.pt", "optim_states.pt"),
        ("log.tar.gz", "notes.txt", "loss.png"),
    ],
)
def test_what_nothing_says_can_be_resumed_is_none(names: tuple[str, ...]) -> None:
    assert kinds(written(names, "run/")) == []
    assert begun(written(names, "run/")) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("optimizer_0/.metadata", "optimizer_0/__0_0.distcp"),
    ],
)
def test_a_part_of_a_sharded_checkpoint_is_none(names: tuple[str, ...]) -> None:
    assert kinds(written(names, "checkpoint_4/")) == []
    whole = written((*names, "optimizer.bin", "model.safetensors", ACCELERATE[-1]), "checkpoint_4/")
    assert kinds(whole) == [("accelerate", 4)]


def test_sharded_weights_must_all_be_there() -> None:
    shards = tuple(f"unet/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    rest = ("optimizer.bin", "random_states_0.pkl")
    assert kinds(written((*shards, *rest), "checkpoint-9/")) == [("accelerate", 9)]
    for two in itertools.combinations(shards, 2):
        assert kinds(written((*two, *rest), "checkpoint-9/")) == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("state.pt", None),
        ("epoch_12.pth", 12),
        ("ckpt-000400.pt", 400),
        ("model_best.pth.tar", None),
        ("checkpoint_8.pth.tar", 8),
    ],
)
def test_a_file_of_torch_is_one_if_it_holds_an_optimizer(name: str, step: int | None) -> None:
    (found,) = find_checkpoints(written((name,), "run/"))
    assert (found.framework, found.step, found.folder) == ("torch-save", step, "run")
    assert found.needs_optimizer
    assert found.must_be_known(f"run/{name}")


def test_lightnings_last_is_written_last() -> None:
    names = ("epoch=0-step=50.ckpt", "last.ckpt")
    assert kinds(written(names)) == [("lightning", 50)]
    newer = written(("epoch=0-step=100.ckpt",), at_ms=20_000)
    assert kinds([*written(names), *newer]) == []
    assert [f.must_be_quiet for f in find_checkpoints(written(names[:1]))] == [True]


def test_what_lies_in_the_outputs_folder_itself_takes_nothing_below_along() -> None:
    listing = [*written(ACCELERATE), *written(("samples/1.png", "samples/2.png"), at_ms=20_000)]
    (found,) = find_checkpoints(listing)
    assert {file.path for file in found.files} == set(ACCELERATE)


def test_of_keras_only_its_own_files_count() -> None:
    """Else each line of a log beside them would be progress."""
    listing = [*written(KERAS), *written(("history.csv", "model.keras"), at_ms=20_000)]
    (found,) = find_checkpoints(listing)
    assert {file.path for file in found.files} == set(KERAS)


def test_which_files_must_be_whole_by_their_own_format() -> None:
    found = FoundCheckpoint("accelerate", "run", 3, (), at="run/checkpoint_3")
    said = {name: found.must_be_known(f"run/checkpoint_3/{name}") for name in WITH_CUSTOM}
    assert said["model.safetensors"]
    assert said["optimizer.bin"]
    assert said["random_states_0.pkl"]
    assert not said["custom_checkpoint_0.pkl"]


def test_each_mark_is_of_one_framework() -> None:
    marks = [layout.mark for layout in FOLDERS]
    assert len(set(marks)) == len(marks)


def test_a_crowd_of_folders_is_looked_through_in_no_time() -> None:
    crowd = [
        file for n in range(3_000) for file in written(ACCELERATE, f"checkpoint_{n}/", at_ms=n * 9)
    ]
    assert len(find_checkpoints(crowd)) == 3_000
    assert begun(crowd) == ""
