"""Jobs that go wrong while they run, in containers: the error is clear, the money is right, nothing
is left running, and the neighbours notice nothing.

All jobs are submitted at the start and run beside each other; each test looks at one of them.

Held by tests of one part already, and not repeated here:

    an index with `..`, an absolute path or a bad name     ray/test_verifying, contracts/test_tree
    a link that is put in place while the agent reads      contracts/test_tree
    chunks that a hostile provider never uploaded          service/test_money, ray/test_verifying
    a checkpoint over the broker's own limit               ray/test_verifying
    a job that takes too much memory                       agent/test_runners
    what a container may do at all                         agent/test_docker_hardening
    logs without end, at the broker                        service/test_logs
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sublet.client import Job
from sublet_contracts.api import JobView
from sublet_contracts.digests import hex_of
from tests.e2e import bad_jobs
from tests.e2e.bad_market import BadMarket
from tests.e2e.scenario import JOB_SCRIPT
from tests.services import require

pytestmark = [pytest.mark.slow, pytest.mark.docker]

AGENTS = ("quick", "loud", "forks", "kept-1", "kept-2", "flip", "cut", "neighbour")
DIGEST = "@sha256:" + "0123456789abcdef" * 4
MOST_LOG_BYTES = 80 << 20


class Played(BadMarket):
    """The market with all bad jobs on it, by name."""

    def play(self, image: str) -> None:
        """Start everything."""
        self.start()
        self.image = image
        for name in AGENTS:
            self.agent(name, runner="docker", region=name.split("-")[0])
        self.offered(*AGENTS)
        out = {"outputs": "/out"}
        self.by_name: dict[str, Job] = {
            "neighbour": self.submit(
                "neighbour",
                [
                    "python3",
                    "/job/job.py",
                    "--steps",
                    "200",
                    "--every",
                    "10",
                    "--pace-s",
                    "0.2",
                    "--out",
                    "/out",
                ],
                image=image,
                inputs={str(JOB_SCRIPT): "/job/job.py"},
                outputs="/out",
            ),
            "loud": self.python("loud", bad_jobs.LOUD, image=image, **out),
            "flip": self.python("flip", bad_jobs.TWO_STEPS, image=image, **out),
            "cut": self.python("cut", bad_jobs.TWO_STEPS, image=image, **out),
            "fails": self.python("quick", bad_jobs.FAILS, image=image, name="fails"),
            "tmp": self.python("quick", bad_jobs.FILLS_ITS_TMP, image=image, name="tmp"),
            "absent": self.submit("quick", ["/no/such/command"], image=image, name="absent"),
            "tag": self.python("quick", "pass", image="registry.invalid/absent:1", name="tag"),
            "digest": self.python("quick", "pass", image="registry.invalid/absent" + DIGEST),
            "disk": self.python("quick", bad_jobs.FILLS_ITS_DISK, image=image, name="disk", **out),
            "deaf": self.python("quick", bad_jobs.DEAF, image=image, name="deaf", stop_grace="2s"),
        }
        for how in bad_jobs.SAYS:
            code = bad_jobs.breaking(how)
            name = how.replace(" ", "-")
            self.by_name[how] = self.python("kept", code, image=image, name=name, **out)

    def end_of(self, name: str) -> JobView:
        """Wait for the end of a job and check what holds of every end."""
        return self.ended(self.by_name[name])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    require("docker")
    from tests.images import base_image

    played = Played(tmp_path_factory.mktemp("bad-jobs"))
    try:
        played.play(base_image())
        yield played
        played.balanced()
    finally:
        played.stop()


def test_a_job_that_fails_at_once(played: Played) -> None:
    view = played.end_of("fails")
    assert (view.state, view.reason) == ("failed", "job_failed")
    assert "see its logs" in view.says
    assert "exit code 3" in view.says
    assert "no column named lable" in played.log(played.by_name["fails"])
    assert len(view.runs) == 1


def test_a_command_that_is_not_in_the_image(played: Played) -> None:
    view = played.end_of("absent")
    assert view.state == "failed"
    words = view.says + " ".join(played.log(played.by_name["absent"]))
    assert "/no/such/command" in words


@pytest.mark.parametrize("name", ["tag", "digest"])
def test_an_image_that_cannot_be_pulled_now(played: Played, name: str) -> None:
    """Its registry has no such host: that may be this machine's trouble, so the job waits on."""
    job = played.by_name[name]
    # Asked again at once, the one machine that there is refuses: it has just tried.
    tried = ("pull_failed", "lease_refused")
    played.until(
        job,
        lambda found: found.reason in tried and "waits for another machine" in found.says,
        "a pull that failed",
    )
    assert played.said_by_us(job, "pull_failed: image 'registry.invalid/absent")
    job.cancel()
    view = played.end_of(name)
    assert (view.state, view.charged_ucr) == ("cancelled", 0)


def test_a_job_that_fills_its_disk(played: Played) -> None:
    view = played.end_of("disk")
    assert (view.state, view.reason) == ("failed", "disk_limit")
    assert "wrote more to disk than it asked for" in view.says
    assert "64 MB were asked for" in view.says


def test_a_job_that_fills_its_temporary_files(played: Played) -> None:
    view = played.end_of("tmp")
    assert view.state == "succeeded"
    assert any("the system says" in line for line in played.log(played.by_name["tmp"]))


def test_a_job_that_ignores_term(played: Played) -> None:
    job = played.by_name["deaf"]
    played.until(job, lambda _: "deaf" in played.log(job), "its first word")
    job.cancel()
    view = played.ended(job)
    assert (view.state, view.reason) == ("cancelled", "cancelled")
    assert view.charged_ucr > 0
    assert len(view.runs) == 1


def test_a_job_that_forks_without_end(played: Played) -> None:
    job = played.python("forks", bad_jobs.FORKS, image=played.image, memory="1GB")

    def processes() -> int:
        found = played.market.containers(job.id)
        return int(found[0].stats(stream=False)["pids_stats"].get("current", 0)) if found else 0

    played.soon(lambda: processes() >= 1000, "the limit of its processes", 60)
    assert processes() <= 1024
    # Its agent is alive, and says so to broker and owner alike.
    assert played.until(job, lambda view: view.runs, "a run").runs[-1].run_state == "running"
    state = str(played.market.root / "forks")
    status = json.loads(played.market.command("provider", "status", "--state", state, "--json"))
    assert status["connected"]
    job.cancel()
    view = played.ended(job)
    assert view.state == "cancelled"
    assert len(view.runs) == 1


def test_a_job_that_prints_100_mb(played: Played, tmp_path: Path) -> None:
    """The log is bounded and says what is missing; everything else arrives."""
    job = played.by_name["loud"]
    view = played.end_of("loud")
    assert view.state == "succeeded", view.says
    lines = list(job.logs())
    kept = [line.text for line in lines if line.stream == "stdout"]
    assert sum(len(text) for text in kept) < MOST_LOG_BYTES
    assert [line.cursor for line in lines] == sorted({line.cursor for line in lines})
    marked = [int(text[1:8]) for text in kept if text.startswith("[")]
    assert marked == sorted(set(marked))
    assert len(marked) <= bad_jobs.LOUD_LINES
    if len(marked) < bad_jobs.LOUD_LINES or kept[-1] != "the end":
        assert [line.text for line in lines if line.stream == "sublet"]
    assert kept[-1] == "the end"
    job.download(tmp_path)
    assert (tmp_path / "result").read_text() == "as it should be"
    agent = played.market.agents["loud"]
    assert agent.running
    again = played.python("loud", "print('still here')", image=played.image)
    assert played.ended(again).state == "succeeded"


@pytest.mark.parametrize("how", list(bad_jobs.SAYS))
def test_a_checkpoint_that_breaks_the_rules(played: Played, tmp_path: Path, how: str) -> None:
    """It is left out, the log says why, and the job and its good checkpoint are none the worse."""
    job = played.by_name[how]
    view = played.end_of(how)
    assert view.state == "succeeded", view.says
    assert view.durable_step == 1
    line = played.said_by_us(job, "the checkpoint of step 2 is left out")
    assert bad_jobs.SAYS[how] in line
    assert [c.step for c in job.checkpoints().checkpoints if c.kind == "checkpoint"] == [1]
    job.download(tmp_path)
    assert (tmp_path / "result").read_text() == "fine"


@pytest.mark.parametrize("name", ["flip", "cut"])
def test_a_checkpoint_that_is_damaged_at_the_broker(
    played: Played, tmp_path: Path, name: str
) -> None:
    """It is quarantined and the one before it is used."""
    job = played.by_name[name]
    played.until(job, lambda view: view.durable_step == 2, "step 2 to be durable")
    newest = next(c for c in job.checkpoints().checkpoints if c.step == 2)
    blobs = played.market.root / "broker" / "blobs"
    digits = hex_of(newest.index_digest)
    index = blobs / "blake3" / digits[:2] / digits[2:4] / digits
    if name == "cut":
        damaged = index
        damaged.write_bytes(index.read_bytes()[:-1])
    else:
        digest = next(
            chunk["digest"]
            for file in json.loads(index.read_bytes())["files"]
            if file["path"] == "state"
            for chunk in file["chunks"]
        )
        database = f"file:{played.market.root}/broker/sublet.sqlite?mode=ro"
        with closing(sqlite3.connect(database, uri=True)) as rows:
            pack, offset, size = rows.execute(
                "SELECT pack, offset_bytes, size_bytes FROM content WHERE digest = ?", (digest,)
            ).fetchone()
        damaged = blobs / "packs" / pack[:2] / pack
        content = bytearray(damaged.read_bytes())
        content[offset + size // 2] ^= 1
        damaged.write_bytes(content)
    assert played.market.kill_run(job.id, name, "docker") == 1
    view = played.ended(job)
    assert view.state == "succeeded", view.says
    assert view.runs[-1].start_step == 1
    states = {c.step: c.state for c in job.checkpoints().checkpoints if c.kind == "checkpoint"}
    assert states == {1: "durable", 2: "quarantined"}
    assert any(damaged.name in path.name for path in (blobs / "quarantine").iterdir())
    job.download(tmp_path)
    assert (tmp_path / "from").read_text() == "1"
    # Whoever failed to restore was not to blame and was not paid for the attempt.
    failed = [run for run in view.runs if run.reason == "restore_failed"]
    assert failed
    assert all(run.charge_ucr == 0 for run in failed)


def test_the_neighbours_notice_nothing(played: Played) -> None:
    view = played.end_of("neighbour")
    assert view.state == "succeeded"
    assert (len(view.runs), view.recoveries) == (1, 0)
    assert view.step == view.durable_step == 200
