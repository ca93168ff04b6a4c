"""Bad input gets an error that names the field and the fix, and loses nothing: what a renter, an
owner or an operator can get wrong before a job runs. Jobs that go wrong while they run stand in
test_bad_jobs.py, a broker whose disk is full in test_bad_disk.py.

Held by tests of one part already, and not repeated here:

    a duplicate key, float, unknown field, foreign type   contracts/test_vectors (hostile documents)
    an offer or lease that is wrong, stale or forged      http/test_agents, agent/test_core
    a frame that is broken, too long, or out of turn      contracts/test_wire, http/test_agents
    one chunk over the limit, or unlike its name          http/test_problems
    a broker's database of a newer version                http/test_start
    a second broker with the same data folder             http/test_start
    a broker's clock that is set back                     stores/test_clock
"""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sublet.errors import SubletError
from sublet.fixes import fix_of
from sublet.spec import JobSpec
from sublet.transfers import InputError, OnBytes
from sublet.units import UnitError
from sublet_agent.adapters.session.journal import VERSION
from sublet_contracts.api import Problem, SignedRequest
from sublet_contracts.auth import sign_request
from sublet_contracts.documents import Job as JobDocument
from sublet_contracts.documents import sign_document
from sublet_contracts.encoding import MAX_DOCUMENT_BYTES
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from tests.e2e.bad_market import BadMarket

TEN_MINUTES_S = 600
SHIFTED = Path(__file__).with_name("shifted_clock")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadMarket]:
    """A market with an owner who takes pinned images only, and one who takes any."""
    world = BadMarket(tmp_path_factory.mktemp("bad-input"))
    try:
        world.start()
        world.agent("pinned", "--image-policy", "digest")
        world.agent("any", "--memory", "1GB")
        world.offered("pinned", "any")
        yield world
        # Other work goes on: after all that was refused, a good job runs as if nothing had been.
        good = world.python("any", "print('fine')")
        assert world.ended(good).state == "succeeded"
        world.balanced()
    finally:
        world.stop()


# -- what nobody offers, or nobody can pay ---------------------------------------------------------


@pytest.mark.slow
def test_an_image_by_tag_where_the_owner_wants_a_digest(world: BadMarket) -> None:
    # In any region the easiest way out is the other owner; with the pinned owner's own price it
    # is a digest.
    assert world.refused("pinned", image="python:3.11").field == "region"
    problem = world.refused("pinned", image="python:3.11", cpus=0.5, disk="1GB", memory="2GB")
    assert (problem.code, problem.field) == ("no_match", "image")
    assert "image (1)" in problem.detail
    assert "name@sha256:" in fix_of(problem)
    pinned = world.python("pinned", "pass", image="python@sha256:" + "0" * 64)
    assert world.ended(pinned).state == "succeeded"


def test_a_gpu_that_nobody_offers(world: BadMarket) -> None:
    problem = world.refused("any", gpus="1x24GB")
    assert problem.code == "no_match"
    assert problem.field == "device_kind"
    assert "device_kind (2)" in problem.detail
    # Both that stand between it and the nearest machine: one alone would get it nothing.
    assert "allow a cpu as device" in fix_of(problem)


@pytest.mark.parametrize(
    ("changes", "field", "fix"),
    [
        ({"memory": "1TB"}, "memory", "of memory"),
        ({"disk": "9000TB"}, "disk", "of disk"),
        ({"cpus": 4096}, "cpu", "cores"),
        ({"max_price": "0.10", "budget": "1"}, "price", "--max-price"),
        ({"egress": True}, "egress", "without network"),
        ({"hardware_class": "gpu-of-dreams"}, "hardware_class", "hardware"),
    ],
)
def test_the_constraint_that_fails_is_named_with_the_cheapest_way_out(
    world: BadMarket, changes: dict[str, object], field: str, fix: str
) -> None:
    problem = world.refused("any", **changes)
    assert problem.code == "no_match"
    assert problem.field == field
    assert field in problem.detail
    assert fix in fix_of(problem)


def test_a_region_that_nobody_is_in(world: BadMarket) -> None:
    problem = world.refused("atlantis")
    assert (problem.code, problem.field) == ("no_match", "region")
    assert "region" in fix_of(problem)


def test_a_budget_under_a_minutes_price(world: BadMarket) -> None:
    problem = world.refused("any", max_price="6.00", budget="0.05")
    assert (problem.code, problem.field) == ("budget_too_small", "budget_ucr")
    assert "at least 0.1" in fix_of(problem)
    problem = world.refused("any", max_price="6.00", budget="1", accept_receipts="0.01")
    assert problem.field == "accept_receipts_up_to_ucr"


def test_a_budget_over_the_balance(world: BadMarket) -> None:
    problem = world.refused("any", budget="51")
    assert (problem.code, problem.status, problem.field) == ("over_balance", 402, "budget_ucr")
    assert "sublet fund" in fix_of(problem)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_price": "a lot"}, "max_price"),
        ({"budget": "0.0000001"}, "budget"),
        ({"gpus": "1x24"}, "gpus"),
        ({"memory": "much"}, "memory"),
        ({"checkpoint_every": "soon"}, "checkpoint_every"),
        ({"outputs": "../out"}, "outputs"),
        ({"outputs": "/a/../../etc"}, "outputs"),
        ({"image": ""}, "image"),
        ({"env": {"A": "x" * MAX_DOCUMENT_BYTES}}, "env"),
        ({"command": ["x" * 2 * MAX_DOCUMENT_BYTES]}, "command"),
        ({"command": ["x" * 4000] * 20}, "command"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything_is_sent(
    world: BadMarket, changes: dict[str, object], named: str
) -> None:
    options = {**world.options("any", ["true"]), **changes}
    with pytest.raises(UnitError) as caught:
        world.client.run(**options)  # type: ignore[arg-type]
    assert named in str(caught.value)


# -- documents and requests ------------------------------------------------------------------------


def job_document(world: BadMarket, *, now_ms: int | None = None) -> JobDocument:
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    spec = JobSpec(**world.options("any", ["true"]))  # type: ignore[arg-type]
    renter, broker = world.client.party, world.client.broker
    return spec.document(renter=renter, broker=broker, now_ms=now, inputs=())


def post(
    world: BadMarket, body: bytes, *, key: SigningKey | None = None, shift_ms: int = 0
) -> httpx.Response:
    """Send a job as it is, signed as a request by `key`."""
    headers = signed_headers(world, body, key, shift_ms)
    return httpx.post(f"{world.market.url}/v1/jobs", content=body, headers=headers, timeout=120)


def signed_headers(
    world: BadMarket, body: bytes, key: SigningKey | None = None, shift_ms: int = 0
) -> dict[str, str]:
    return sign_request(
        key or world.client.key,
        broker=world.client.broker,
        method="POST",
        target="/v1/jobs",
        body=body,
        time_ms=time.time_ns() // 1_000_000 + shift_ms,
        nonce=os.urandom(16).hex(),
    ) | {"Content-Type": "application/json"}


def wrapped(envelope: Envelope) -> bytes:
    return SignedRequest(envelope=envelope).model_dump_json().encode()


def altered(envelope: Envelope, **changes: object) -> bytes:
    return json.dumps({"envelope": {**envelope.model_dump(mode="json"), **changes}}).encode()


def bad_documents(world: BadMarket) -> dict[str, tuple[bytes, int, str, str]]:
    """Return body, status, field, and a word of the error, for each way to get it wrong."""
    now_ms = time.time_ns() // 1_000_000
    key = world.client.key
    day_ms = 86_400_000
    good = sign_document(job_document(world), key).envelope
    late = sign_document(job_document(world, now_ms=now_ms - 30 * day_ms), key).envelope
    early = sign_document(job_document(world, now_ms=now_ms + TEN_MINUTES_S * 1000), key).envelope
    stranger = sign_document(job_document(world), SigningKey.generate()).envelope
    signature = {"keyid": key.party, "sig": good.signatures[0].sig[:-8] + "AAAAAA=="}
    oversized = "QUFB" * (MAX_DOCUMENT_BYTES // 3 + 2)
    return {
        "no JSON": (b"{", 400, "body", "JSON"),
        "no envelope": (b"{}", 422, "envelope", "required"),
        "one field too many": (altered(good, more=1), 422, "envelope.more", "not permitted"),
        "payload is no base64": (altered(good, payload="%%"), 422, "envelope.payload", "base64"),
        "payload is no document": (altered(good, payload="e30="), 422, "signatures", "signature"),
        "oversized": (altered(good, payload=oversized), 422, "envelope.payload", "at most"),
        "a body without end": (b" " * 2_000_000, 413, "body", "at most"),
        "expired": (wrapped(late), 422, "expires_ms", "expired"),
        "future-dated": (wrapped(early), 422, "issued_ms", "future"),
        "signed by another": (wrapped(stranger), 422, "signatures", "not signed by"),
        "wrong signature": (altered(good, signatures=[signature]), 422, "signatures", "match"),
        "another kind": (
            altered(good, payloadType="application/vnd.sublet.offer.v1+json"),
            422,
            "payloadType",
            "expected",
        ),
    }


KINDS = [
    "no JSON", "no envelope", "one field too many", "payload is no base64",
    "payload is no document", "oversized", "a body without end", "expired", "future-dated",
    "signed by another", "wrong signature", "another kind",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_document_is_refused_and_changes_nothing(world: BadMarket, kind: str) -> None:
    body, status, field, word = bad_documents(world)[kind]
    before = world.client.balance(), len(world.client.jobs().jobs)
    answer = post(world, body)
    assert answer.status_code == status, answer.text
    problem = Problem.model_validate_json(answer.content)
    assert problem.field == field, problem
    assert word in problem.detail
    assert fix_of(problem)
    assert (world.client.balance(), len(world.client.jobs().jobs)) == before


@pytest.mark.slow
def test_a_replayed_request_counts_once(world: BadMarket) -> None:
    signed = sign_document(job_document(world), world.client.key)
    body = wrapped(signed.envelope)
    headers = signed_headers(world, body)
    url = f"{world.market.url}/v1/jobs"
    answers = [httpx.post(url, content=body, headers=headers, timeout=120) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 409]
    problem = Problem.model_validate_json(answers[1].content)
    assert (problem.code, problem.field) == ("replayed", "Sublet-Nonce")
    # The same document in a new request is the same job, and holds no second budget.
    assert post(world, body).json()["id"] == signed.id
    job = world.client.job(signed.id)
    assert world.ended(job).state == "succeeded"
    assert len([j for j in world.client.jobs().jobs if j.id == signed.id]) == 1
    # Nor does it after its end: what was paid once is not held or run again.
    assert post(world, body).json()["state"] == "succeeded"
    assert world.client.balance().held_ucr == 0


def test_a_request_signed_by_somebody_else(world: BadMarket) -> None:
    body = wrapped(sign_document(job_document(world), world.client.key).envelope)
    answer = post(world, body, key=SigningKey.generate())
    assert answer.status_code in (403, 422)
    assert fix_of(Problem.model_validate_json(answer.content))
    forged = signed_headers(world, body) | {"Sublet-Party": SigningKey.generate().party}
    url = f"{world.market.url}/v1/jobs"
    answer = httpx.post(url, content=body, headers=forged, timeout=120)
    assert (answer.status_code, answer.json()["field"]) == (401, "Sublet-Signature")


# -- inputs ----------------------------------------------------------------------------------------


def test_an_input_that_is_missing(world: BadMarket, tmp_path: Path) -> None:
    before = world.client.balance()
    with pytest.raises(InputError, match="no such file"):
        world.python("any", "pass", inputs={str(tmp_path / "absent.csv"): "/data/x.csv"})
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="link"):
        world.python("any", "pass", inputs={str(tmp_path / "link"): "/data/x.csv"})
    assert world.client.balance() == before


@pytest.mark.parametrize("how", ["rewritten", "shortened", "deleted"])
def test_an_input_that_changes_under_upload(world: BadMarket, tmp_path: Path, how: str) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(os.urandom(6 << 20))
    before = world.client.balance(), len(world.client.jobs().jobs)

    def meanwhile(_what: str, _total_bytes: int) -> OnBytes:
        match how:
            case "rewritten":
                data.write_bytes(os.urandom(6 << 20))
            case "shortened":
                os.truncate(data, 5 << 20)
            case "deleted":
                data.unlink()
        return lambda _count: None

    inputs = {str(data): "/data/data.csv"}
    options = world.options("any", ["true"], inputs=inputs)
    with pytest.raises(InputError) as caught:
        world.client.run(announce=meanwhile, **options)  # type: ignore[arg-type]
    assert "changed" in str(caught.value)
    assert "submit again" in str(caught.value)
    assert (world.client.balance(), len(world.client.jobs().jobs)) == before


def test_an_input_lost_at_the_broker_is_asked_for_again(world: BadMarket, tmp_path: Path) -> None:
    """What the broker keeps of it is gone after the upload: the same submit heals it."""
    data = tmp_path / "data.txt"
    data.write_text("precious" * 1000)
    blobs = world.market.root / "broker" / "blobs"

    def files() -> set[Path]:
        return {path for path in blobs.rglob("*") if path.is_file()}

    known = files()
    code = "print(len(open('/data/data.txt').read()) if __import__('os').path.exists("
    code += "'/data/data.txt') else 0)"
    first = world.python("any", code, inputs={str(data): "/data/data.txt"})
    world.ended(first)
    uploaded = files() - known
    assert any("packs" in path.parts for path in uploaded)
    for path in uploaded:
        path.unlink()
    second = world.python("any", code, inputs={str(data): "/data/data.txt"}, name="again")
    assert world.ended(second).state == "succeeded"


# -- clocks ----------------------------------------------------------------------------------------


def shifted(seconds_file: Path) -> dict[str, str]:
    """Return an environment in which Python's wall clock is off by what the file says."""
    return {**os.environ, "PYTHONPATH": str(SHIFTED), "SHIFTED_CLOCK_FILE": str(seconds_file)}


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", [TEN_MINUTES_S, -TEN_MINUTES_S])
def test_a_renters_clock_that_is_ten_minutes_off(
    world: BadMarket, tmp_path: Path, shift_s: int
) -> None:
    (tmp_path / "shift").write_text(str(shift_s))
    code = (
        "import sys; from pathlib import Path; from sublet.client import Client, SubletError\n"
        "try: Client(broker=sys.argv[1], config_dir=Path(sys.argv[2])).balance()\n"
        "except SubletError as e: print(e.problem.code, e.problem.field, e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, world.market.url, str(world.root / "config")],
        env=shifted(tmp_path / "shift"),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.startswith("clock Sublet-Time-Ms ")
    assert "set the clock" in done.stdout
    assert ("in the future" if shift_s > 0 else "ago") in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", [TEN_MINUTES_S, -TEN_MINUTES_S])
def test_an_agent_whose_clock_is_ten_minutes_off_joins_once_it_is_set(
    world: BadMarket, tmp_path: Path, shift_s: int
) -> None:
    shift = tmp_path / "shift"
    shift.write_text(str(shift_s))
    log = tmp_path / "log"
    state = tmp_path / "state"
    name = f"off{shift_s}".replace("-", "behind")
    with log.open("wb") as out:
        agent = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sublet_agent.main",
                "--broker",
                world.market.url,
                "--state",
                str(state),
                "--cpu",
                "--runner",
                "process",
                "--trust",
                world.client.party,
                "--region",
                name,
                "--name",
                name,
            ],
            env=shifted(shift),
            stdout=out,
            stderr=out,
        )
    try:
        direction = "ahead of" if shift_s > 0 else "behind"
        world.soon(lambda: f"s {direction} the broker's" in log.read_text(), "the refusal")
        assert "timedatectl set-ntp true" in log.read_text()
        assert name not in {offer.name for offer in world.client.offers().offers}
        assert agent.poll() is None
        shift.write_text("0")
        world.soon(
            lambda: name in {offer.name for offer in world.client.offers().offers}, "its offer"
        )
        good = world.python(name, "pass")
        assert world.ended(good).state == "succeeded"
    finally:
        agent.terminate()
        assert agent.wait(300) == 0


# -- ports and folders -----------------------------------------------------------------------------


def provide(world: BadMarket, state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sublet.cli.main",
            "provide",
            "--broker",
            world.market.url,
            "--state",
            str(state),
            "--cpu",
            "--runner",
            "process",
            "--trust",
            world.client.party,
            *arguments,
        ],
        env={**os.environ, **world.market.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_a_second_agent_with_the_same_state_folder(world: BadMarket) -> None:
    """The first one's run doesn't notice."""
    job = world.python("any", "import time; time.sleep(6)")
    world.until(job, lambda view: view.runs and view.runs[-1].run_state == "running", "a run")
    second = provide(world, world.market.root / "any")
    assert second.returncode == 1
    assert "another agent is using" in second.stdout
    assert "--state" in second.stdout
    assert "Traceback" not in second.stdout + second.stderr
    view = world.ended(job)
    assert (view.state, len(view.runs)) == ("succeeded", 1)


def test_a_state_folder_of_a_newer_release(world: BadMarket, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with sqlite3.connect(state / "journal.db") as database:
        database.execute(f"PRAGMA user_version={VERSION + 1}")
    database.close()
    before = (state / "journal.db").read_bytes()
    done = provide(world, state)
    assert done.returncode == 1
    assert "newer release" in done.stdout
    assert "update sublet" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (state / "journal.db").read_bytes() == before


@pytest.mark.slow
def test_a_taken_port_through_the_command_line(world: BadMarket, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "sublet.cli.main",
                "broker",
                "--listen",
                f"127.0.0.1:{port}",
                "--data",
                str(tmp_path / "data"),
            ],
            env={**os.environ, **world.market.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_client_is_one_that_people_can_read(world: BadMarket) -> None:
    with pytest.raises(SubletError) as caught:
        world.client.job("no-such-job")
    assert caught.value.problem.status == 404
    assert "no-such-job" in str(caught.value)
