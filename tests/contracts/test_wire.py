"""Frames: every message there and back, and what a hostile peer may send instead."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sublet_contracts import wire
from sublet_contracts.documents import sign_document, versions_read
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import (
    MAX_FRAME_BYTES,
    MESSAGES,
    FrameRefused,
    Heartbeat,
    LogLine,
    Logs,
    Message,
    RunReport,
    decode_frame,
    encode_frame,
)
from tests.contracts.samples import (
    BROKER,
    CHECKPOINT_ID,
    JOB_ID,
    KEYS,
    LEASE_ID,
    NOW_MS,
    samples,
)

READS = versions_read()
SIGNED: dict[str, Envelope] = {
    document.KIND: sign_document(document, *(KEYS[name] for name in signers)).envelope
    for document, signers in samples()
}


def report(**change: Any) -> RunReport:
    plain: dict[str, Any] = {
        "lease": LEASE_ID, "epoch": 2, "state": "running", "cum_device_ms": 5, "step": 3,
        "total_steps": 80, "metrics": {"loss": 0.25, "train/accuracy": 1}, "detail": "",
        "usage": {
            "age_ms": 900, "cpu_millis": 1250, "memory_bytes": 2**31, "disk_bytes": 7,
            "devices": ({"id": "GPU-7/0", "utilization_percent": 97},),
        },
        "stall": {"saves": 3, "all_stall_ms": 900, "stall_ms": 200, "write_ms": 4000},
        "cadence": {
            "interval_ms": 190_000, "rests_on": "link", "cost_ms": 210, "durable_after_ms": 9000,
            "most_lost_ms": 250_000, "spacing_ms": 241_000, "unanswered_ms": 50,
        },
    }  # fmt: skip
    return RunReport.model_validate(plain | change)


def line(number: int, text: str) -> LogLine:
    return LogLine(number=number, time_ms=NOW_MS, stream="stdout", text=text)


def messages() -> list[Message]:
    """Return one of each message."""
    return [
        wire.Hello(broker=BROKER, nonce="ab" * 16, versions=(1,), time_ms=NOW_MS, reads=READS),
        wire.Join(proof=SIGNED["session"], version=1, reads=READS),
        wire.Welcome(
            heartbeat_ms=3000, fee_bps=500, leases=(wire.HeldLease(lease=LEASE_ID, epoch=2),)
        ),
        wire.Refused(code="clock", detail="set it"),
        wire.Ack(mids=("m-1", "m:2")),
        wire.Announce(offer=SIGNED["offer"]),
        wire.Withdraw(offer_sequence=7),
        wire.Assign(lease=SIGNED["lease"], job=SIGNED["job"], checkpoint=SIGNED["checkpoint"]),
        wire.LeaseAnswer(lease=LEASE_ID, signed=SIGNED["lease"]),
        wire.Prepare(job=SIGNED["job"], checkpoint=None),
        wire.Unprepare(job=JOB_ID),
        wire.Order(
            lease=LEASE_ID, epoch=2, desired="drain", reason=Reason.RECLAIMED, grace_ms=60_000
        ),
        Heartbeat(runs=(report(),)),
        wire.RunChanged(
            lease=LEASE_ID,
            epoch=2,
            state="exited",
            cum_device_ms=9,
            reason=Reason.RUN_KILLED,
            exit_code=-9,
            detail="größer",
        ),
        wire.CheckpointUploaded(
            checkpoint=SIGNED["checkpoint"], sent_bytes=210, took_ms=5_100, stall_ms=300
        ),
        wire.CheckpointVerdict(
            lease=LEASE_ID, epoch=2, checkpoint=CHECKPOINT_ID, kind="outputs", step=4, durable=True
        ),
        wire.ReceiptIssued(receipt=SIGNED["receipt"]),
        wire.SettlementNotice(settlement=SIGNED["settlement"]),
        Logs(lease=LEASE_ID, epoch=2, lines=(line(0, "a"), line(1, "\x1b[31m\u2028 \U0001f600"))),
        wire.LogStates(
            lease=LEASE_ID,
            epoch=2,
            states=(wire.LogState(number=2, time_ms=NOW_MS, stream="stderr", text="40 % ▌"),),
        ),
        wire.LogsWanted(lease=LEASE_ID, next_number=2),
        wire.Prepared(job=JOB_ID, ready=False, detail="no room"),
    ]


def mid_of(message: Message) -> str | None:
    return "m-1" if message.RELIABLE else None


def test_there_is_one_of_each_message() -> None:
    assert [message.TYPE for message in messages()] == list(MESSAGES)


@pytest.mark.parametrize("message", messages(), ids=lambda m: str(m.TYPE))
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    frame = encode_frame(message, mid_of(message))
    assert decode_frame(frame) == (message, mid_of(message))


@pytest.mark.parametrize("message", messages(), ids=lambda m: str(m.TYPE))
def test_exactly_the_reliable_messages_have_a_mid(message: Message) -> None:
    wrong = None if message.RELIABLE else "m-1"
    with pytest.raises(FrameRefused, match="mid"):
        encode_frame(message, wrong)
    value = json.loads(encode_frame(message, mid_of(message))) | {"mid": wrong}
    with pytest.raises(FrameRefused, match=f"{message.TYPE}: .* mid"):
        decode_frame(json.dumps(value).encode())


@pytest.mark.parametrize("message", messages(), ids=lambda m: str(m.TYPE))
def test_no_message_takes_a_field_it_does_not_know(message: Message) -> None:
    value = json.loads(encode_frame(message, mid_of(message)))
    value["body"]["surprise"] = 1
    with pytest.raises(FrameRefused, match=r"surprise: .*not permitted"):
        decode_frame(json.dumps(value).encode())


def changed_heartbeat(old: str, new: str) -> bytes:
    text = encode_frame(Heartbeat(runs=(report(),))).decode()
    assert text.count(old) == 1
    return text.replace(old, new).encode()


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"", "not JSON"),
        (b"null", "valid dictionary|instance of Frame"),
        (b"[]", "valid dictionary|instance of Frame"),
        (b'{"type":"heartbeat","mid":null}', "body: Field required"),
        (b'{"type":"heartbeat","mid":null,"body":[]}', "body: Input should be"),
        (b'{"type":"heartbeat","mid":null,"body":{"runs":[]},"x":1}', "x: .*not permitted"),
        (b'{"type":"heartbeat","type":"ack","mid":null,"body":{}}', "stands twice"),
        (b'{"type":"reboot","mid":null,"body":{}}', "unknown message type 'reboot'; update"),
        (b'{"type":"__class__","mid":null,"body":{}}', "unknown message type"),
        (b'{"type":7,"mid":null,"body":{}}', "type: Input should be a valid string"),
        (b'{"type":"' + b"x" * 41 + b'","mid":null,"body":{}}', "at most 40"),
        (b'{"type":"withdraw","mid":"","body":{"offer_sequence":1}}', "mid: .*at least 1"),
        (b'{"type":"withdraw","mid":"a b","body":{"offer_sequence":1}}', "mid: .*pattern"),
        (b'{"type":"withdraw","mid":"a\\n","body":{"offer_sequence":1}}', "mid: .*pattern"),
        (b'{"type":"withdraw","mid":"' + b"a" * 81 + b'","body":{}}', "mid: .*at most 80"),
        (b'{"type":"withdraw","mid":"a","body":{"offer_sequence":1.0}}', "valid integer"),
        (b'{"type":"withdraw","mid":"a","body":{"offer_sequence":true}}', "valid integer"),
        (b'{"type":"withdraw","mid":"a","body":{"offer_sequence":"1"}}', "valid integer"),
        (b'{"type":"withdraw","mid":"a","body":{"offer_sequence":9007199254740992}}', "2\\*\\*53"),
        (b'{"type":"ack","mid":null,"body":{"mids":["\\ud800"]}}', "surrogate"),
        (b'{"type":"ack","mid":null,"body":{"\\udfff":[]}}', "surrogate"),
        (b'{"type":"ack","mid":null,"body":{"mids":' + b"[" * 900 + b"]" * 900 + b"}}", "deeper"),
        (b"[" * 1_000_000, "deeper than 32"),
        (b" " * (MAX_FRAME_BYTES + 1), f"at most {MAX_FRAME_BYTES}"),
        (changed_heartbeat("0.25", "NaN"), "NaN is not a number"),
        (changed_heartbeat("0.25", "-Infinity"), "not a number"),
        (changed_heartbeat("0.25", "1e999"), "too large"),
        (changed_heartbeat("0.25", '"0.25"'), "metrics.loss: .*valid number"),
        (changed_heartbeat('"running"', '"unknown"'), "runs.0.state"),
        (changed_heartbeat('"running"', '"lost"'), "runs.0.state"),
        (changed_heartbeat('"cum_device_ms":5', '"cum_device_ms":-5'), "runs.0.cum_device_ms"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_frame_is_refused(frame: bytes, error: str) -> None:
    with pytest.raises(FrameRefused, match=error):
        decode_frame(frame)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameRefused):
        decode_frame(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    kind=st.sampled_from(sorted(MESSAGES)),
    mid=st.none() | st.just("m"),
    field=st.integers(0),
    value=JSON,
)
def test_any_value_in_any_field_gives_a_message_or_a_refusal(
    kind: str, mid: str | None, field: int, value: Any
) -> None:
    message = next(m for m in messages() if kind == m.TYPE)
    body = message.model_dump(mode="json")
    name = sorted(body)[field % len(body)]
    body[name] = value
    frame = json.dumps({"type": kind, "mid": mid, "body": body}).encode()
    try:
        decoded, decoded_mid = decode_frame(frame)
    except FrameRefused:
        return
    assert decoded_mid == mid
    assert decode_frame(encode_frame(decoded, decoded_mid)) == (decoded, mid)


def test_a_frame_is_never_sent_that_could_not_be_read() -> None:
    lines = tuple(line(number, "x" * 16_000) for number in range(70))
    with pytest.raises(FrameRefused, match=f"logs: .* at most {MAX_FRAME_BYTES} fit"):
        encode_frame(Logs(lease=LEASE_ID, epoch=1, lines=lines))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        report(metrics={"loss": value})


def test_limits_hold_on_both_ends() -> None:
    with pytest.raises(ValidationError, match="at most 64"):
        Heartbeat(runs=(report(),) * 65)
    with pytest.raises(ValidationError, match="at most 500"):
        Logs(lease=LEASE_ID, epoch=1, lines=(line(0, ""),) * 501)
    with pytest.raises(ValidationError, match="at most 16384"):
        line(0, "x" * 16_385)
    with pytest.raises(ValidationError, match="at most 32"):
        report(metrics={f"m{number}": 1.0 for number in range(33)})


def test_the_largest_documents_fit_into_one_frame() -> None:
    envelope = SIGNED["job"].model_copy(update={"payload": "A" * 87_384})
    assign = wire.Assign(lease=envelope, job=envelope, checkpoint=envelope)
    assert len(encode_frame(assign, "m-1")) < MAX_FRAME_BYTES
