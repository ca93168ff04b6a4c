"""A job's warnings as its renter sees them, and what pausing or cancelling it says before."""

import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from sublet.cli.jobs import _jobs_table
from sublet.cli.main import main
from sublet.terminal import losses
from sublet.terminal.follow import Changes
from sublet.terminal.losses import loss_of
from sublet.terminal.warning_fixes import FIXES, fix_of_warning
from sublet.terminal.warning_text import warning_lines, warning_marks
from sublet_contracts.api import JobView, WarningView
from sublet_contracts.documents import Job, Resources, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.job_warnings import WARNINGS, WarningCode, warning_text
from sublet_contracts.keys import SigningKey
from sublet_contracts.states import JobState
from tests.sdk.market import SmallMarket
from tests.sdk.test_follow import job, run

Capture = pytest.CaptureFixture[str]
NOW_MS = 10_000_000


def document(**changes: Any) -> Envelope:
    key = SigningKey.generate()
    fields: dict[str, Any] = {
        **{"renter": key.party, "broker": key.party, "nonce": "0" * 32, "name": "ft"},
        **{"image": "local/python", "command": (), "env": {}, "inputs": ()},
        "resources": Resources(devices=1, device_kind="cpu", memory_bytes=1, disk_bytes=1),
        **{"max_price_ucr_per_device_hour": 1, "budget_ucr": 1, "accept_receipts_up_to_ucr": 1},
        **{"checkpoint_interval_ms": 120_000, "patience_ms": 20_000},
        **{"issued_ms": 1, "expires_ms": 2},
    }
    return sign_document(Job(**{**fields, **changes}), key).envelope


def warned(*codes: str, epoch: int = 1, **changes: Any) -> JobView:
    warnings = []
    for code in codes:
        known = WARNINGS.get(WarningCode(code)) if code in set(WarningCode) else None
        facts = dict.fromkeys(known.facts if known else (), 660_000)
        says = warning_text(code, facts)
        warnings.append(WarningView(code=code, since_ms=1, epoch=epoch, says=says, facts=facts))
    values = {"document": document(), **changes}
    return job(JobState.RUNNING, run(epoch, "alice"), warnings=tuple(warnings), **values)


def test_each_warning_has_a_fix() -> None:
    assert set(FIXES) == set(WarningCode)
    for code in WarningCode:
        view = warned(code)
        assert fix_of_warning(view.warnings[0], view), code


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--checkpoint DIR, the folder that it saves to"),
        ({"outputs": "/out"}, "its output_dir below /out"),
        ({"checkpoints": ("ckpts",)}, "nothing whole lies in ckpts yet"),
    ],
)
def test_the_fix_fits_the_job(changes: dict[str, Any], words: str) -> None:
    view = warned("nothing_saved", document=document(**changes))
    (line,) = warning_lines(view)
    assert line.startswith(
        "nothing that could be resumed has been saved yet; a loss now costs 11 m"
    )
    assert words in line


def test_of_named_folders_it_is_said_that_what_only_grows_makes_no_checkpoint() -> None:
    view = warned("saves_stopped", document=document(checkpoints=("results",)))
    (line,) = warning_lines(view)
    assert "a file that only grows makes no checkpoint" in line
    (line,) = warning_lines(warned("saves_stopped"))
    assert "only grows" not in line


def test_the_file_that_it_writes_names_the_folder() -> None:
    view = warned("nothing_saved")
    about = view.warnings[0].model_copy(update={"about": "/out/my runs/state.pkl"})
    assert "it writes /out/my runs/state.pkl: run it with --checkpoint '/out/my runs'" in (
        fix_of_warning(about, view)
    )
    odd = view.warnings[0].model_copy(update={"about": "/out/\x1b[2J.pkl"})
    assert "\x1b" not in fix_of_warning(odd, view)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/out/checkpoint-40/model.safetensors", "leave out save_only_model"),
        ("/out/final/adapter_model.safetensors", "PEFT: an adapter alone"),
        ("/out/unet/diffusion_pytorch_model.safetensors", "--resume_from_checkpoint latest"),
        ("/out/epoch_3/model-00001-of-00002.safetensors", "accelerator.save_state(folder)"),
        ("/out/epoch=1-step=20.ckpt", 'fit(ckpt_path="last")'),
        ("/out/best.weights.h5", "keras.callbacks.BackupAndRestore(folder)"),
        ("/out/7/default/manifest.ocdbt", "orbax.checkpoint.CheckpointManager(folder)"),
        ("weights.pt", "optimizer.state_dict()"),
    ],
)
def test_the_file_that_it_writes_says_what_its_framework_needs(path: str, words: str) -> None:
    view = warned("nothing_saved")
    fix = fix_of_warning(view.warnings[0].model_copy(update={"about": path}), view)
    assert "run it with --checkpoint" in fix
    assert words in fix
    assert fix.count("\n") == 0


def test_a_file_that_says_nothing_of_its_framework_gets_no_more_than_the_folder() -> None:
    view = warned("nothing_saved")
    about = view.warnings[0].model_copy(update={"about": "/out/state.pkl"})
    assert fix_of_warning(about, view).endswith("is kept and put back")


def test_a_warning_of_a_newer_broker_is_shown_as_it_says() -> None:
    view = warned("too_hot")
    assert list(warning_lines(view)) == ["too hot"]
    assert warning_marks(view) == "too hot"


def test_ps_has_a_short_mark_and_no_column_where_nothing_is_wrong() -> None:
    well = job(JobState.RUNNING, run(1, "alice"))
    assert "WARNING" not in _jobs_table([well], NOW_MS)
    shown = _jobs_table([warned("nothing_saved", "stands_still"), well], NOW_MS).splitlines()
    assert shown[0].endswith("WARNING")
    assert shown[1].endswith("nothing saved +1")
    assert shown[2].endswith("ago")


def test_following_tells_each_warning_once_and_when_it_is_over() -> None:
    changes = Changes()
    assert not [text for text in changes.since_last(warned()) if "warning" in text]
    (told,) = changes.since_last(warned("nothing_saved"))
    assert told.startswith("warning: nothing that could be resumed")
    assert list(changes.since_last(warned("nothing_saved"))) == []
    (both,) = changes.since_last(warned("nothing_saved", "devices_idle"))
    assert both.startswith("warning: its GPU has computed nothing for 11 m")
    assert list(changes.since_last(warned("devices_idle"))) == ["no longer: nothing saved"]


# -- before a stop ---------------------------------------------------------------------------------


def test_with_nothing_saved_a_pause_says_what_is_lost() -> None:
    view = warned("nothing_saved", unsaved_device_ms=720_000, unsaved_ucr=80_000)
    loss = loss_of(view, NOW_MS, verb="pause")
    assert loss.says == (
        "nothing has been saved: a resume starts over, and 12 m of work (0.08 credits) is lost, "
        "unless the job saves when it is asked to stop"
    )
    assert loss.worth_asking
    assert "a resume" not in loss_of(view, NOW_MS, verb="cancel").says


def test_with_something_durable_it_says_from_where_and_how_old() -> None:
    changes = {"durable_step": 40, "durable_ms": NOW_MS - 120_000, "unsaved_device_ms": 121_000}
    loss = loss_of(warned(unsaved_ucr=500, **changes), NOW_MS, verb="pause")
    assert loss.says.startswith("a resume goes on from step 40, saved 2 m ago; 2 m 1 s of work")
    assert not loss.worth_asking
    assert loss_of(warned("saves_stopped", **changes), NOW_MS, verb="pause").worth_asking


def test_of_what_does_not_run_nothing_is_said() -> None:
    for state in (JobState.QUEUED, JobState.PAUSED, JobState.SUCCEEDED):
        assert loss_of(job(state), NOW_MS, verb="pause").says == ""
    fresh = warned(unsaved_device_ms=30_000)
    assert not loss_of(fresh, NOW_MS, verb="pause").worth_asking


@pytest.fixture
def anything_is_worth_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "WORTH_ASKING_MS", 0)


def until_it_works(market: SmallMarket, id: str) -> None:
    def works() -> bool:
        return market.client.job(id).view().unsaved_device_ms > 0

    market.local.wait_for(works, "work that could be lost", market.local.agents["alice"])


SLEEPS = [
    *("run", "--gpus", "cpu", "--max-price", "1", "--budget", "1", "--memory", "256MB"),
    *("--disk", "256MB", "--cpus", "0.5", "--stop-grace", "1s", "-y", "-d"),
    *("local/python", "python3", "-c", "import time; time.sleep(60)"),
]


@pytest.mark.usefixtures("anything_is_worth_asking")
def test_a_pause_that_would_lose_work_is_asked_about(
    at_market: SmallMarket, capsys: Capture
) -> None:
    assert main(SLEEPS) == 0
    id = capsys.readouterr().out.strip()
    until_it_works(at_market, id)
    assert main(["pause", id]) == 2
    error = capsys.readouterr().err
    assert "nothing has been saved: a resume starts over" in error
    assert "add -y" in error
    assert at_market.client.job(id).view().state == "running"
    assert main(["pause", "-y", "--json", id]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["id"] == id, "what is said besides goes to stderr"
    assert main(["cancel", id]) == 0
    assert main(["wait", id]) == 103


@pytest.mark.usefixtures("anything_is_worth_asking")
def test_a_cancel_goes_on_where_nobody_can_be_asked(
    at_market: SmallMarket, capsys: Capture
) -> None:
    assert main(SLEEPS) == 0
    id = capsys.readouterr().out.strip()
    until_it_works(at_market, id)
    assert main(["cancel", id]) == 0
    assert "nothing has been saved: " in capsys.readouterr().err
    assert main(["wait", id]) == 103


ASKED = (
    "import sys; from sublet.terminal import losses; losses.WORTH_ASKING_MS = 0;"
    "from sublet.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def at_a_terminal(market: SmallMarket, answer: str, *arguments: str) -> tuple[int, str]:
    """Run a command at a terminal that answers so; return its code and what it said."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ASKED, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=market.environment
    )
    os.close(theirs)
    os.write(ours, answer.encode() + b"\n")
    process.communicate(timeout=60)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    return process.returncode, said


def test_at_a_terminal_it_asks_and_no_stops_nothing(
    at_market: SmallMarket, capsys: Capture
) -> None:
    assert main(SLEEPS) == 0
    id = capsys.readouterr().out.strip()
    until_it_works(at_market, id)
    code, said = at_a_terminal(at_market, "n", "pause", id)
    assert code == 1
    assert re.search(r"nothing has been saved: a resume starts over, and .* is lost", said)
    assert "Pause it anyway? [y/N]" in said
    assert at_market.client.job(id).view().state == "running"
    code, said = at_a_terminal(at_market, "y", "cancel", id)
    assert code == 0
    assert "Cancel it anyway? [y/N]" in said
    assert main(["wait", id]) == 103
