"""The command line against a real broker and a real agent; codes and words as scripts see them."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from sublet.cli.main import MONEY, OTHERS, RENTERS, main
from sublet.cli.receipts import receipts
from tests.sdk.market import SCRIPT, SmallMarket

TERMS = ["--gpus", "cpu", "--max-price", "1", "--budget", "1"]
SMALL = [*TERMS, "--memory", "256MB", "--disk", "256MB", "--cpus", "0.5"]
TRAIN = ["local/python", "python3", "/job/training_job.py", "--steps", "10", "--every", "5"]
TRAINING = [
    *("--input", f"{SCRIPT}:/job/training_job.py", "--outputs", "/out"),
    *(*TRAIN, "--pace-s", "0.05", "--out", "/out"),
]

Capture = pytest.CaptureFixture[str]


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from sublet.cli.main import main; main(['--help']);"
            "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    heavy = {"typer", "rich", "pydantic", "httpx", "cryptography", "argparse", "asyncio"}
    assert heavy.intersection(done.stderr.split()) == set()
    for name in (*RENTERS, *MONEY, *OTHERS):
        assert f"\n  {name} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 90


@pytest.mark.parametrize("name", [*RENTERS, *MONEY])
def test_every_command_has_help(name: str, capsys: Capture) -> None:
    assert main([name, "--help"]) == 0
    assert f"sublet {name}" in capsys.readouterr().out


def test_usage_errors_say_what_to_do(at_market: SmallMarket, capsys: Capture) -> None:
    for arguments, words in (
        (["ofers"], "did you mean `sublet offers`?"),
        (["run", "image"], "--max-price, --budget: missing"),
        (["run", *SMALL, "-e", "=x", "image"], "-e SEED=17"),
        (["run", *SMALL, "--input", "x", "image"], "data.csv:/data/data.csv"),
        (["run", *SMALL, "--gpus", "lots", "-y", "image"], "error: --gpus: 'lots'"),
        (["run", *SMALL, "-y", "../images"], "error: IMAGE: '../images' names no image"),
        (["run", *SMALL, "image"], "add -y"),
        (["receipts", "bake"], "export or verify"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error
        assert "fix: " in error


def test_the_whole_story(at_market: SmallMarket, tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", *SMALL, "--name", "story", "-y", *TRAINING]) == 0
    shown = capsys.readouterr()
    assert "step 10 loss" in shown.out
    assert "It costs at most 1.00 credits in all." in shown.err
    assert "alice" in shown.err

    assert main(["logs", "-f", "story"]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["logs", "story", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["cursor"] for line in lines] == sorted({line["cursor"] for line in lines})

    assert main(["wait", "story", "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert main(["inspect", view["id"][:10]]) == 0
    text = capsys.readouterr().out
    assert "succeeded" in text
    assert main(["ps", "-a", "--json"]) == 0
    assert "story" in [job["name"] for job in json.loads(capsys.readouterr().out)["jobs"]]

    assert main(["statement", "story"]) == 0
    text += capsys.readouterr().out
    assert main(["statement", "story", "--json"]) == 0
    statement = json.loads(capsys.readouterr().out)
    assert statement["charged_ucr"] == view["charged_ucr"] > 0
    assert statement["charges"][0]["receipt"][:10] in text
    assert main(["events", "story"]) == 0
    assert "running → succeeded" in capsys.readouterr().out
    for command in (["ps", "-a"], ["offers"], ["balance"]):
        assert main(command) == 0
        text += capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []

    evidence = tmp_path / "f.json"
    assert main(["receipts", "export", "story", "-o", str(evidence)]) == 0
    assert main(["receipts", "verify", str(evidence)]) == 0
    said = capsys.readouterr().out
    assert f"broker   {at_market.client.broker}\n" in said
    assert f"trusted: your profile pinned it when you first used {at_market.local.url}" in said

    assert main(["download", "story", str(tmp_path / "out"), "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert json.loads(Path(file).read_text())


def test_changed_evidence_does_not_hold(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["run", *SMALL, "--name", "evidence", "-y", "local/python", "python3", "-c", "1"]
    assert main([*arguments, "--json"]) == 0 or main(arguments) == 0
    capsys.readouterr()
    evidence = tmp_path / "f.json"
    assert main(["receipts", "export", "evidence", "-o", str(evidence)]) == 0
    data = evidence.read_bytes()
    offset = data.index(b'"payload"') + 60
    for position in (offset, len(data) // 2, len(data) - 3):
        changed = bytearray(data)
        changed[position] ^= 1
        evidence.write_bytes(changed)
        assert main(["receipts", "verify", str(evidence)]) == 1, position
        assert "does NOT hold" in capsys.readouterr().out
    evidence.write_bytes(data)
    another = "ed25519-" + "0" * 64
    assert main(["receipts", "verify", str(evidence), "--broker", another]) == 1
    said = capsys.readouterr()
    assert "not of" in said.out
    assert f"checked against {another}, as you gave it with --broker" in said.out
    assert f"than the one that is trusted: {at_market.client.broker}" in said.err
    assert "fix: if that is the one you mean" in said.err
    assert main(["receipts", "verify", str(evidence), "--broker", "127.0.0.1:8470"]) == 2
    said = capsys.readouterr()
    assert "error: --broker: '127.0.0.1:8470' is no broker's id" in said.err
    assert "sublet whoami" in said.err


def test_a_stranger_is_told_that_nobody_vouches_for_the_broker(
    market: SmallMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = market.client.run(
        **{"image": "local/python", "command": ["true"], "gpus": "cpu", "name": "stranger"},
        **{"max_price": 1, "budget": 1, "memory": "256MB", "disk": "256MB", "cpus": 0.5},
    )
    job.wait()
    evidence = tmp_path / "f.json"
    evidence.write_bytes(job.export())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing-pinned"))
    monkeypatch.setenv("SUBLET_BROKER", "http://127.0.0.1:9")
    assert receipts(["verify", str(evidence), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broker_trusted"] is False


def test_codes_of_jobs(at_market: SmallMarket, capsys: Capture) -> None:
    base = ["run", *SMALL, "-y"]
    fails = ["local/python", "python3", "-c", "raise SystemExit(3)"]
    assert main([*base, "--name", "code-fails", *fails]) == 100
    capsys.readouterr()
    sleeps = ["local/python", "python3", "-c", "import time; time.sleep(60)"]
    assert main([*base, "--stop-grace", "1s", "--name", "code-cancelled", "-d", *sleeps]) == 0
    job = capsys.readouterr().out.strip()
    assert len(job) == 64
    assert main(["cancel", job]) == 0
    assert main(["wait", job]) == 103
    assert main(["inspect", "no-such-job"]) == 102
    assert "fix: sublet ps" in capsys.readouterr().err
    # A name that is wrong anywhere stops the whole command.
    assert main(["cancel", "no-such-job", job]) == 102


def test_what_is_refused_before_anything_is_submitted(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture
) -> None:
    jobs = len(at_market.client.jobs().jobs)
    image = ["local/python", "true"]
    for arguments, words in (
        (["--gpus", "4x80GB", "--no-wait"], "no offer fits, of 1 on the market"),
        (["--input", f"{tmp_path}/nope:/in"], "there is no such file"),
        (["--budget", "500"], "--budget: the budget is 500.00"),
        (["--budget", "0.001"], "a minute of this job"),
    ):
        assert main(["run", *SMALL, *arguments, "-y", *image]) == 1, arguments
        error = capsys.readouterr().err
        assert words in error
        assert "fix: " in error
        assert "_ucr" not in error
    assert main(["run", *SMALL, "--gpus", "4x80GB", "--no-wait", "-y", "--json", *image]) == 1
    assert json.loads(capsys.readouterr().err)["fix"]
    assert main(["run", *SMALL, "--dry-run", *image]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == ["true"]
    assert len(at_market.client.jobs().jobs) == jobs


def test_finetune_shows_the_offers_and_asks_as_run_does(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "reviews.csv"
    data.write_text("text,label\n" + "fine,good\npoor,bad\n" * 20)
    terms = ["--gpus", "cpu", "--max-price", "1", "--budget", "1"]
    assert main(["finetune", "minilm", str(data), *terms]) == 2
    error = capsys.readouterr().err
    assert "It costs at most 1.00 credits in all." in error
    assert "add -y to submit without asking" in error
    assert main(["finetune", "minilm", str(data), *terms, "-y", "-d"]) == 0
    job = capsys.readouterr().out.strip()
    assert at_market.client.job(job).view().command[:2] == ("python3", "/job/train.py")
    assert main(["cancel", job]) == 0


def test_a_broker_that_is_away_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["whoami", "--broker", "http://127.0.0.1:9", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["broker_answers"] is False
    assert Path(said["key"]).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("sublet.cli.parser.AWAY_LIMIT_S", 0.3)
    assert main(["ps", "--broker", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert "no answer from http://127.0.0.1:9" in error
    assert "SUBLET_BROKER" in error
    assert main(["ps", "--broker", "ftp://x"]) == 1
    assert "must start with http" in capsys.readouterr().err


def test_on_a_terminal_it_asks_and_draws(at_market: SmallMarket) -> None:
    """A child on a pseudo-terminal: 'y' is typed, and the picture is there at the end."""
    command = [sys.executable, "-m", "sublet.cli.main", "run", *SMALL, "--name", "tty", *TRAINING]
    master, slave = pty.openpty()
    environment = {**at_market.environment, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    ) as child:
        os.close(slave)
        os.write(master, b"y\n")
        screen = b""
        while chunk := _read(master):
            screen += chunk
        assert child.wait() == 0
    os.close(master)
    text = screen.decode()
    assert "Submit? [y/N]" in text
    assert "alice takes the job" in text
    assert "step 10/10" in text
    assert "sublet statement" in text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        # The last process of the terminal has gone.
        return b""
