"""What a job has written comes back, from every end: what can be carried is, the rest is listed."""

import json
from pathlib import Path

import pytest

from sublet.cli.main import main
from sublet.client import Job
from sublet.downloads import Downloaded
from sublet.errors import SubletError
from sublet.transfers import TargetError
from sublet_contracts.api import NextStep
from sublet_contracts.tree import WhyLeftOut
from tests.sdk.market import SCRIPT, SmallMarket

Capture = pytest.CaptureFixture[str]

OUT = "import os, socket, sys, time; o = os.environ['SUBLET_OUTPUT_DIR']; "
MODEL = OUT + "open(o + '/model.bin', 'w').write('w' * 100); "

ODD: dict[str, tuple[str, dict[str, WhyLeftOut]]] = {
    # Case 08, six inputs.
    "link": (
        "os.makedirs(o + '/wandb/run-1'); open(o + '/wandb/run-1/log.txt', 'w').write('hello'); "
        "os.symlink('run-1', o + '/wandb/latest-run')",
        {"wandb/latest-run": WhyLeftOut.LINK},
    ),
    "backslash": (
        "open(o + '/loss\\\\acc.png', 'w').write('x')",
        {"loss\\acc.png": WhyLeftOut.NAME},
    ),
    "fifo": ("os.mkfifo(o + '/pipe')", {"pipe": WhyLeftOut.NOT_A_FILE}),
    "socket": (
        "s = socket.socket(socket.AF_UNIX); os.chdir(o); s.bind('s.sock')",
        {"s.sock": WhyLeftOut.NOT_A_FILE},
    ),
    "many": (
        "[open(f'{o}/{i:05}.txt', 'w').close() for i in range(20001)]",
        {"19999.txt": WhyLeftOut.TOO_MANY, "20000.txt": WhyLeftOut.TOO_MANY},  # the model is bigger
    ),
    "badutf8": (
        "open(os.fsencode(o) + b'/caf\\xe9.txt', 'w').write('x')",
        {"caf\\xe9.txt": WhyLeftOut.NAME},
    ),
    # Neighbours that are in no list.
    "newline": ("open(o + '/a\\nb.txt', 'w').write('x')", {"a\\nb.txt": WhyLeftOut.NAME}),
    "odd folder": (
        "os.mkdir(o + '/a\\tb'); open(o + '/a\\tb/in', 'w').write('x')",
        {"a\\tb": WhyLeftOut.NAME},
    ),
    "deep": (
        "os.makedirs(o + '/d' * 140); open(o + '/d/top', 'w').write('x')",
        {"/".join("d" * 129): WhyLeftOut.TOO_DEEP},
    ),
    "hard link": ("os.link(o + '/model.bin', o + '/same.bin')", {}),
    "sparse": ("f = open(o + '/sparse', 'wb'); f.truncate(40 * 10**6)", {}),
    "link away": ("os.symlink('/etc/passwd', o + '/passwd')", {"passwd": WhyLeftOut.LINK}),
    "gone": ("import shutil; shutil.rmtree(o); os.symlink('/etc', o)", {"": WhyLeftOut.LINK}),
}


def submit(
    market: SmallMarket, code: str, name: str, disk: str = "256MB", outputs: str = "/out"
) -> Job:
    return market.client.run(
        "local/python",
        ["python3", "-c", code],
        gpus="cpu",
        memory="256MB",
        cpus=0.5,
        max_price=1,
        budget=1,
        outputs=outputs,
        stop_grace="5s",
        name=name,
        disk=disk,
    )


def log_of(job: Job) -> str:
    return "\n".join(line.text for line in job.logs())


def content(found: Downloaded, target: Path) -> dict[str, bytes]:
    return {file.relative_to(target).as_posix(): file.read_bytes() for file in found}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "many")) for kind in ODD]
)
def test_an_odd_entry_costs_only_itself(market: SmallMarket, kind: str, tmp_path: Path) -> None:
    code, odd = ODD[kind]
    job = submit(market, MODEL + code, f"odd-{kind.replace(' ', '-')}")
    view = job.wait()
    assert view.state == "succeeded", view.says
    found = job.download(tmp_path / "out")
    files = content(found, tmp_path / "out")
    assert files.get("model.bin") == (None if kind == "gone" else b"w" * 100)
    assert {entry.path: entry.why for entry in found.left_out} == odd
    assert found.left_out_total == len(odd)
    if kind == "link":
        assert files["wandb/run-1/log.txt"] == b"hello"
        assert found.left_out[0].detail == "to run-1"
    if kind == "hard link":
        assert files["same.bin"] == files["model.bin"]
    if kind == "sparse":
        assert files["sparse"] == bytes(40 * 10**6)
    if kind == "many":
        assert len(files) == 20_000
    log = log_of(job)
    assert all(f"left out of the outputs: {path or 'the folder'}: " in log for path in odd)
    assert str(market.local.root) not in log


def test_a_job_that_fails_gives_back_what_it_had_written(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture
) -> None:
    code = MODEL + (
        "open(o + '/metrics.csv', 'w').write('a,b\\n1,2\\n'); os.mkfifo(o + '/pipe'); "
        "raise RuntimeError('eval: division by zero')"
    )
    job = submit(at_market, code, "fails-late")
    view = job.wait()
    assert view.state == "failed"
    assert view.next_step is NextStep.DOWNLOAD_PARTIAL_OUTPUTS
    assert view.outputs is None
    assert main(["inspect", "fails-late"]) == 0
    shown = capsys.readouterr().out
    assert "kept       partial outputs (108 B)\n           until " in shown
    assert "6 days left" in shown
    assert "pipe: neither a file nor a folder" in shown
    assert main(["inspect", "fails-late", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept_days_left"] == 6
    assert told["left_out_total"] == 1
    target = tmp_path / "out"
    assert main(["download", "fails-late", str(target)]) == 0
    shown_err = capsys.readouterr().err
    assert "these are partial: run 1 did not finish" in shown_err
    assert "pipe: neither a file nor a folder" in shown_err
    assert (target / "metrics.csv").read_text() == "a,b\n1,2\n"
    assert main(["download", "fails-late", str(target), "--json", "--include", "*.bin"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["partial"]
    assert told["files"] == [str(target / "model.bin")]


@pytest.mark.parametrize("end", ["cancel", "pause"])
def test_a_job_that_is_stopped_gives_back_what_it_had_written(
    market: SmallMarket, end: str, tmp_path: Path
) -> None:
    job = submit(market, MODEL + "print('ready', flush=True); time.sleep(60)", f"stopped-by-{end}")
    for line in job.logs(follow=True):
        if line.text == "ready":
            break
    (job.cancel if end == "cancel" else job.pause)()
    view = job.wait()
    assert view.state == ("cancelled" if end == "cancel" else "paused")
    found = job.download(tmp_path / "out")
    assert found.kind == "partial-outputs"
    assert content(found, tmp_path / "out") == {"model.bin": b"w" * 100}
    assert job.statement().charges[0].payable_device_ms == view.runs[0].cum_device_ms
    if end == "pause":
        job.cancel()


def test_a_job_that_passed_its_disk_limit_gives_back_what_fits(
    market: SmallMarket, tmp_path: Path
) -> None:
    code = MODEL + (
        "[open(f'{o}/{i}.bin', 'wb').write(os.urandom(2**22)) for i in range(20)]; time.sleep(60)"
    )
    job = submit(market, code, "too-big", disk="50MB")
    view = job.wait()
    assert view.reason == "disk_limit"
    found = job.download(tmp_path / "out")
    assert content(found, tmp_path / "out")["model.bin"] == b"w" * 100
    assert len(found) > 10
    assert {entry.why for entry in found.left_out} == {WhyLeftOut.TOO_BIG}


def test_a_job_that_named_no_folder_gets_what_it_wrote_in_its_working_folder(
    market: SmallMarket, tmp_path: Path
) -> None:
    code = (
        "import os; open('model.pt', 'w').write('w'); os.makedirs('runs/1/__pycache__'); "
        "open('runs/1/log.csv', 'w').write('1'); open('runs/1/__pycache__/x.pyc', 'w').write('c'); "
        "os.symlink('1', 'runs/latest')"
    )
    job = submit(market, code, "in-its-folder", outputs="")
    assert job.wait().state == "succeeded"
    found = job.download(tmp_path / "out")
    assert content(found, tmp_path / "out") == {"model.pt": b"w", "runs/1/log.csv": b"1"}
    assert [entry.path for entry in found.left_out] == ["runs/latest"]


def test_a_job_that_wrote_nothing_says_so(market: SmallMarket, tmp_path: Path) -> None:
    job = submit(market, "print(1)", "wrote-nothing", outputs="")
    assert job.wait().state == "succeeded"
    with pytest.raises(SubletError, match="it wrote nothing that is brought back"):
        job.download(tmp_path / "out")


def test_checkpoints_come_back_while_the_job_runs(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture
) -> None:
    job = at_market.client.run(
        "local/python",
        [
            *("python3", "/job/training_job.py", "--steps", "4000", "--every", "5"),
            *("--pace-s", "0.05", "--out", "/out"),
        ],
        gpus="cpu", memory="256MB", disk="256MB", cpus=0.5, max_price=1, budget=1,
        inputs={str(SCRIPT): "/job/training_job.py"}, outputs="/out", name="saving",
        stop_grace="5s",
    )  # fmt: skip
    try:
        with pytest.raises(SubletError, match="outputs come when a run ends") as caught:
            job.download(tmp_path / "none")
        assert caught.value.fix.startswith("sublet ")
        while job.view().durable_step < 10:
            pass
        with pytest.raises(SubletError, match="there are checkpoints of steps") as caught:
            job.download(tmp_path / "none")
        assert caught.value.fix.endswith("--checkpoint latest")
        found = job.download(tmp_path / "latest", checkpoint="latest")
        assert (found.kind, found.step) >= ("checkpoint", 10)
        assert json.loads((tmp_path / "latest" / "DONE").read_text())["step"] == found.step
        again = job.download(tmp_path / "again", checkpoint=found.step)
        assert content(again, tmp_path / "again") == content(found, tmp_path / "latest")
        with pytest.raises(SubletError, match="no checkpoint of step 1: kept are step"):
            job.download(tmp_path / "none", checkpoint=1)
        with pytest.raises(SubletError, match="says which one is the best"):
            job.download(tmp_path / "none", checkpoint="best")
        with pytest.raises(SubletError, match="it is a step, `latest` or `best`"):
            job.download(tmp_path / "none", checkpoint="newest")
        with pytest.raises(SubletError, match=r"no file of the checkpoint .* matches; there are"):
            job.download(tmp_path / "none", checkpoint="latest", include=["*.png"])
        assert main(["download", "saving", "--partial"]) == 1
        assert (
            "has no partial outputs, which are what a run leaves that doesn't finish; there are"
            in capsys.readouterr().err
        )
    finally:
        job.cancel()
    assert job.wait().state == "cancelled"
    assert job.download(tmp_path / "ended", checkpoint="latest").step >= found.step


TRAINER = (
    MODEL
    + """
import json
os.makedirs(o + '/runs')
for step, best in ((10, 10), (20, 10)):
    folder = o + f'/runs/checkpoint-{step}'
    os.makedirs(folder)
    for name in ('model.safetensors', 'optimizer.pt', 'scheduler.pt'):
        open(folder + '/' + name, 'w').write(name + str(step))
    state = {'global_step': step, 'max_steps': 40, 'best_global_step': best}
    open(folder + '/trainer_state.json', 'w').write(json.dumps(state))
time.sleep(1)
raise SystemExit(3)
"""
)


def test_the_best_checkpoint_comes_under_the_names_that_the_script_gave(
    market: SmallMarket, tmp_path: Path
) -> None:
    job = submit(market, TRAINER, "trainer")
    assert job.wait().state == "failed"
    if not job.view().durable_step:
        pytest.fail("the Trainer's checkpoint was not taken")
    best = job.download(tmp_path / "best", checkpoint="best")
    assert {name.rpartition("/")[0] for name in content(best, tmp_path / "best")} == {
        "runs/checkpoint-10"
    }
    latest = job.download(tmp_path / "latest", checkpoint="latest")
    names = content(latest, tmp_path / "latest")
    assert "runs/checkpoint-20/model.safetensors" in names
    assert "runs/checkpoint-10/model.safetensors" in names
    assert not any("outputs-layout" in name for name in names)


def test_a_place_that_can_not_be_written_has_good_words(
    market: SmallMarket, tmp_path: Path
) -> None:
    job = submit(market, MODEL, "places")
    assert job.wait().state == "succeeded"
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        with pytest.raises(TargetError, match="file is not a folder; name a folder"):
            job.download(place)
    (tmp_path / "taken" / "model.bin").mkdir(parents=True)
    with pytest.raises(TargetError, match=r"model\.bin is a folder"):
        job.download(tmp_path / "taken")
    assert file.read_text() == "mine"


def test_an_interrupted_download_goes_on(market: SmallMarket, tmp_path: Path) -> None:
    code = OUT + "[open(f'{o}/{i}.bin', 'wb').write(os.urandom(5 * 2**20)) for i in range(12)]"
    job = submit(market, code, "pieces")
    assert job.wait().state == "succeeded"
    target = tmp_path / "out"
    moved: list[int] = []

    class Interrupted(Exception):
        pass

    def breaks(what: str, total_bytes: int):  # type: ignore[no-untyped-def]
        def on_bytes(count_bytes: int) -> None:
            moved.append(count_bytes)
            if len(moved) == 2:
                raise Interrupted

        return on_bytes

    with pytest.raises(Interrupted):
        job.download(target, breaks)
    assert not list(target.glob("*.bin"))
    totals: list[int] = []

    def counts(what: str, total_bytes: int):  # type: ignore[no-untyped-def]
        totals.append(total_bytes)
        return lambda count_bytes: None

    found = job.download(target, counts)
    assert len(found) == 12
    assert 0 < totals[0] < 60 * 2**20
    assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []
    job.download(target, counts)
    assert totals[1] == 0
