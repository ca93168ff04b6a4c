"""Every parser of hostile bytes, with an oracle and seeds that our own code makes.

An oracle: the documented error, and nothing else, may be raised; its message can be sent on; what
is accepted is written again as bytes that read back the same, and those are written identically.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel

from sublet_agent.adapters.workspace.reader import MAX_PROGRESS_BYTES, read_progress
from sublet_agent.adapters.workspace.workspace import check_done
from sublet_agent.core.checkpoints import within
from sublet_contracts.addresses import TYPE as ADDRESSES
from sublet_contracts.addresses import AddressRefused, read_runs, read_upload
from sublet_contracts.api import JobLogLine
from sublet_contracts.auth import EMPTY_DIGEST, RequestRefused, authenticate, sign_request
from sublet_contracts.checkpoint_folders import read_record as read_folder_record
from sublet_contracts.checkpoint_layouts import read_record, read_trainer_state
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import (
    DOCUMENTS,
    Document,
    DocumentRefused,
    read_document,
    refused_by_validation,
    sign_document,
)
from sublet_contracts.encoding import EncodingError, canonical_json, parse_json
from sublet_contracts.envelope import Envelope, sign_payload
from sublet_contracts.export import parse_export, verify_export
from sublet_contracts.file_formats import check_file
from sublet_contracts.keys import KeyRefused, SigningKey, public_key
from sublet_contracts.session import AgentSession, BrokerSession, SessionError, SessionProof
from sublet_contracts.tree import Chunk, ScannedTree, TreeFile, TreeIndex, TreeRefused, parse_index
from sublet_contracts.wire import FrameRefused, RunStall, decode_frame, encode_frame
from tests.contracts.samples import BROKER, KEYS, NOW_MS, samples
from tests.contracts.test_wire import messages
from tests.histories.asgi import Door

VECTORS = Path(__file__).parents[1] / "contracts" / "vectors"
KINDS: tuple[type[Document], ...] = (*DOCUMENTS, SessionProof)
MAX_MESSAGE_BYTES = 4096
"""An error's text goes into a frame, a log line or an answer: it must fit there."""


@dataclass(frozen=True)
class Target:
    """A parser under its oracle: `run` raises only where the parser is wrong."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def can_be_told(error: Exception) -> None:
    """Check that the refusal can be sent to whoever is to read it."""
    said = str(error).encode()
    assert 0 < len(said) <= MAX_MESSAGE_BYTES, f"a refusal of {len(said)} bytes"


def same_again(model: BaseModel) -> None:
    """What was accepted can be written, read back, and is written to the same bytes."""
    written = canonical_json(model.model_dump(mode="json"))
    parse_json(written, max_bytes=max(1, len(written)), allow_floats=True)
    again = type(model).model_validate_json(written)
    assert canonical_json(again.model_dump(mode="json")) == written


def samples_signed() -> list[tuple[Document, Envelope]]:
    """Every kind of document, signed by whom it takes."""
    return [(d, sign_document(d, *(KEYS[n] for n in names)).envelope) for d, names in samples()]


def _vectors(name: str) -> dict[str, list[dict[str, object]]]:
    loaded: dict[str, list[dict[str, object]]] = json.loads(
        (VECTORS / f"{name}.json").read_text(encoding="utf-8")
    )
    return loaded


# Strict JSON


def _json(data: bytes) -> None:
    for floats in (False, True):
        try:
            value = parse_json(data, allow_floats=floats)
        except EncodingError as error:
            can_be_told(error)
            continue
        written = canonical_json(value)
        again = parse_json(written, max_bytes=max(1, len(written)), allow_floats=floats)
        assert canonical_json(again) == written


def _json_seeds() -> Iterable[bytes]:
    yield from (
        b'{"a":1,"a":2}',
        b"1e999",
        b"NaN",
        b"-Infinity",
        b"9007199254740993",
        b"-0",
        b"1.5",
        b'"\\ud800"',
        b'"\\ud83d\\ude00"',
        b"\xef\xbb\xbf{}",
        b"[" * 33 + b"]" * 33,
        b"null",
        '"größer ≥\u2028"'.encode(),
    )
    yield from (envelope.payload_bytes for _, envelope in samples_signed())


# Envelopes and the documents inside


def _envelope(data: bytes) -> None:
    try:
        parse_json(data)
        envelope = Envelope.model_validate_json(data)
    except EncodingError as error:
        can_be_told(error)
        return
    except ValueError as error:
        can_be_told(refused_by_validation(error))  # type: ignore[arg-type]
        return
    same_again(envelope)
    rebuilt = Envelope.model_validate(envelope.model_dump())
    assert (rebuilt.payload_bytes, rebuilt.id) == (envelope.payload_bytes, envelope.id)
    for kind in KINDS:
        try:
            document = read_document(envelope, kind)
        except DocumentRefused as error:
            can_be_told(error)
        else:
            same_again(document)


def _envelope_seeds() -> Iterable[bytes]:
    for _, envelope in samples_signed():
        yield envelope.model_dump_json().encode()
    for case in _vectors("hostile")["cases"]:
        if isinstance(case.get("envelope"), dict):
            yield json.dumps(case["envelope"]).encode()


def _document(data: bytes) -> None:
    """The first byte chooses the kind; the rest is a payload that a hostile party did sign."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    envelope = sign_payload(kind.payload_type(), data[1:], [KEYS["stranger"]])
    try:
        document = read_document(envelope, kind, signed_by=(KEYS["stranger"].party,))
    except DocumentRefused as error:
        can_be_told(error)
    else:
        same_again(document)


def _document_seeds() -> Iterable[bytes]:
    for document, envelope in samples_signed():
        yield bytes([KINDS.index(type(document))]) + envelope.payload_bytes


def _party(data: bytes) -> None:
    text = data.decode("latin-1")
    try:
        key = public_key(text)
    except KeyRefused as error:
        can_be_told(error)
    else:
        assert "ed25519-" + key.public_bytes_raw().hex() == text


def _party_seeds() -> Iterable[bytes]:
    yield from (key.party.encode() for key in KEYS.values())
    yield from (f"ed25519-{case['hex']}".encode() for case in _vectors("keys")["refused"])


# The wire


def _frame(data: bytes) -> None:
    try:
        message, mid = decode_frame(data)
    except FrameRefused as error:
        can_be_told(error)
        return
    try:
        written = encode_frame(message, mid)
    except FrameRefused as error:  # It was shorter before: defaults are written out.
        if "at most" not in str(error):
            raise
        return
    again = decode_frame(written)
    assert again == (message, mid)
    assert encode_frame(*again) == written


def _frame_seeds() -> Iterable[bytes]:
    for message in messages():
        yield encode_frame(message, "m1" if message.RELIABLE else None)


def _session(data: bytes) -> None:
    """Frames one after another, split at line ends, to either side of a conversation."""
    side, frames = data[:1], data[1:].split(b"\n")[:8]
    if side < b"\x80":
        broker = BrokerSession(BROKER, "ab" * 16)
        broker.hello(NOW_MS)
        try:
            for frame in frames:
                broker.receive(frame, NOW_MS)
        except SessionError as error:
            can_be_told(error)
            broker.refuse(error)
        assert broker.proof is None or broker.proof.nonce == "ab" * 16
        return
    agent = AgentSession(KEYS["provider"], instance="cd" * 16, agent_version="0", broker=BROKER)
    try:
        for frame in frames:
            agent.receive(frame, NOW_MS)
    except SessionError as error:
        can_be_told(error)
        assert agent.phase == "closed"


def _session_seeds() -> Iterable[bytes]:
    broker = BrokerSession(BROKER, "ab" * 16)
    hello = broker.hello(NOW_MS)
    agent = AgentSession(KEYS["provider"], instance="cd" * 16, agent_version="0", broker=BROKER)
    join = agent.receive(hello, NOW_MS)[1]
    assert join is not None
    frames = list(_frame_seeds())
    yield b"\x00" + join
    yield b"\xff" + hello
    yield from (b"\xff" + hello + b"\n" + frame for frame in frames)
    yield from (b"\x00" + join + b"\n" + frame for frame in frames)


# Checkpoints


def _index(data: bytes) -> None:
    try:
        index = parse_index(data)
    except TreeRefused as error:
        can_be_told(error)
        return
    written = index.to_bytes()
    assert parse_index(written) == index
    assert parse_index(written).to_bytes() == written
    assert index.total_bytes == sum(file.size_bytes for file in index.files)
    for file in index.files:
        inside = Path("/root/of/tree", file.path)
        assert inside.is_relative_to("/root/of/tree")
        assert ".." not in inside.parts


def _tree(content: dict[str, bytes]) -> tuple[TreeIndex, dict[str, bytes]]:
    chunks = {digest_of(data): data for data in content.values()}
    files = []
    for path, data in sorted(content.items()):
        digest = digest_of(data)
        parts = (Chunk(digest=digest, size_bytes=len(data)),) if data else ()
        files.append(TreeFile(path=path, size_bytes=len(data), chunks=parts))
    return TreeIndex(files=tuple(files)), chunks


def _index_seeds() -> Iterable[bytes]:
    yield _tree({})[0].to_bytes()
    yield _tree({"a": b"1", "folder/größe": b"2", "folder/empty": b""})[0].to_bytes()
    yield b'{"files":[{"path":"../x","size_bytes":0,"chunks":[]}]}'


class _ReadTree(ScannedTree):
    """A folder as it was read, with what lay in it."""

    def __init__(self, content: dict[str, bytes]) -> None:
        index, chunks = _tree(content)
        super().__init__(index, {})
        object.__setattr__(self, "content", chunks)

    def read_chunk(self, digest: str) -> bytes:
        data: bytes = self.content[digest]  # type: ignore[attr-defined]
        return data


_WEIGHTS = {"model.bin": b"weights"}


def _done(data: bytes) -> None:
    tree = _ReadTree({"DONE": data, **_WEIGHTS})
    try:
        stall = check_done(tree, 7)
    except TreeRefused as error:
        can_be_told(error)
        return
    if stall is not None:
        # It goes into the next heartbeat.
        RunStall.model_validate(asdict(within(stall, 10**9)))
    said = json.loads(data)
    assert int(said["step"]) == 7
    assert {f["path"] for f in said["files"]} == set(_WEIGHTS)


def _done_seeds() -> Iterable[bytes]:
    entry = {"path": "model.bin", "size_bytes": len(_WEIGHTS["model.bin"])}
    times = {"saves": 2, "all_stall_ms": 70, "stall_ms": 30, "write_ms": 2**60}
    yield json.dumps({"step": 7, "files": [entry], "meta": {}}).encode()
    yield json.dumps({"step": 7, "files": [entry], "meta": {}} | times).encode()
    yield json.dumps({"step": 8, "files": [entry], "meta": {"loss": 0.5}}).encode()
    for path in ("\ud800", "a" * 100_000):
        yield json.dumps({"step": 7, "files": [entry, entry | {"path": path}]}).encode()
    yield b'{"step": 1e999, "files": []}'
    yield b'{"step": 7, "files": [{"path": null, "size_bytes": "7"}], "saves": true}'


def _progress(data: bytes) -> None:
    said = read_progress(data)
    if said is None:
        return
    assert len(data) <= MAX_PROGRESS_BYTES
    step, total, metrics = said
    assert 0 <= step < 2**53
    assert 0 <= total < 2**53
    # It goes into the next heartbeat as it is: there it must fit.
    written = canonical_json({"step": step, "total": total, "metrics": metrics})
    assert read_progress(written) == said


def _progress_seeds() -> Iterable[bytes]:
    yield b'{"step": 3, "total": 10, "metrics": {"loss": 0.5, "lr": 1e-4}}'
    yield b'{"step": true, "total": -1, "metrics": {"a": NaN, "b": 1e999, "": 1, "c": "x"}}'
    yield b'{"step": 1' + b"0" * 400 + b', "metrics": {"huge": 1' + b"0" * 400 + b"}}"
    yield b"[]"


def _layout(data: bytes) -> None:
    """What a trainer (trainer_state.json) or our own record of its files left in a checkpoint."""
    for step in (None, 7):
        state = read_trainer_state(data, step)
        assert state is None or 0 <= state.total_steps < 2**53
    try:
        same_again(read_record(data))
    except ValueError as error:
        can_be_told(error)


def _layout_seeds() -> Iterable[bytes]:
    yield b'{"global_step": 7, "max_steps": 20, "epoch": 0.5, "log_history": [{"loss": 1.0}]}'
    yield b'{"files":[{"path":"checkpoint-7/model.bin","size_bytes":7,"mtime_ms":1}]}'
    yield b'{"global_step": 1e400, "max_steps": "20"}'


def _saved_file(data: bytes) -> None:
    """A file of a checkpoint, of any format, and our own record of a folder that a job named."""
    for name in ("a.pt", "a.safetensors", "a.json", "a.npy", "a.pkl", "a.h5", "a"):
        verdict = check_file(name, len(data), lambda offset, length: data[offset : offset + length])
        assert bool(verdict.torn) is (verdict.kind == "torn")
    try:
        same_again(read_folder_record(data))
    except ValueError as error:
        can_be_told(error)


def _saved_file_seeds() -> Iterable[bytes]:
    yield b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
    yield b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4), }"
    yield b'\x10\0\0\0\0\0\0\0{"w":{"dtype":"U8","data_offsets":[0,4]}}'
    yield b"\x89HDF\r\n\x1a\n" + bytes(56)
    yield b"\x80\x04\x95\x05\0\0\0\0\0\0\0]\x94."
    yield (
        b'{"step":1,"trained_step":0,"total_steps":0,"folders":["a"],"files":[{"folder":0,"path":'
        b'"a","size_bytes":1,"mtime_ms":1,"sha256":"' + b"0" * 64 + b'"}]}'
    )


# Requests, exports, logs


def _headers(data: bytes) -> None:
    """Fields in Latin-1 as they come off the socket, each ended by a zero byte."""
    fields = [*data.decode("latin-1").split("\0"), *[""] * 7][:7]
    party, time, nonce, signature, key, method, target = fields
    headers = {
        "Sublet-Party": party, "Sublet-Time-Ms": time, "Sublet-Nonce": nonce,
        "Sublet-Signature": signature, "Idempotency-Key": key,
    }  # fmt: skip
    try:
        caller = authenticate(
            headers,
            broker=BROKER,
            method=method,
            target=target,
            body_digest=EMPTY_DIGEST,
            now_ms=NOW_MS,
        )
    except RequestRefused as error:
        can_be_told(error)
        if error.header not in headers:
            raise
        return
    # One request is written in one way only: nobody can send another form of what was signed.
    assert (caller.party, str(caller.time_ms), caller.nonce) == (party, time, nonce)


def _headers_seeds() -> Iterable[bytes]:
    for method, target, key in (("GET", "/v1/jobs", ""), ("POST", "/v1/jobs?wait=true", "again")):
        fields = signed_fields(KEYS["renter"], method, target, key)
        yield fields
        yield fields.replace(str(NOW_MS).encode(), b"0" + str(NOW_MS).encode())
    for request in _vectors("requests")["requests"]:
        headers = request["headers"]
        assert isinstance(headers, dict)
        fields = [str(headers[name]) for name in HEADERS]
        fields += [str(request[name]) for name in ("key", "method", "target")]
        yield "\0".join(fields).encode("latin-1")


HEADERS = ("Sublet-Party", "Sublet-Time-Ms", "Sublet-Nonce", "Sublet-Signature")


def signed_fields(key: SigningKey, method: str, target: str, idempotency_key: str) -> bytes:
    """Return the fields of a request without a body as `_headers` takes them."""
    made = sign_request(
        key,
        broker=BROKER,
        method=method,
        target=target,
        body=b"",
        time_ms=NOW_MS,
        nonce="5a" * 16,
        idempotency_key=idempotency_key,
    )
    fields = [*(made[name] for name in HEADERS), idempotency_key, method, target]
    return "\0".join(fields).encode("latin-1")


def _export(data: bytes) -> None:
    try:
        export = parse_export(data)
    except DocumentRefused as error:
        can_be_told(error)
        assert not verify_export(data).holds
        return
    same_again(export)
    verify_export(data)


def _export_seeds() -> Iterable[bytes]:
    by_kind = {type(document).KIND: envelope for document, envelope in samples_signed()}
    lists = {
        "amendments": "amendment", "offers": "offer", "leases": "lease",
        "checkpoints": "checkpoint", "receipts": "receipt", "settlements": "settlement",
    }  # fmt: skip
    for ids in (True, False):
        export = {
            "broker": BROKER,
            "job": by_kind["job"].model_dump(mode="json"),
            "tree_head": by_kind["tree-head"].model_dump(mode="json"),
            "proofs": {"a" * 64: {"position": 0, "path": ["b" * 64]}} if ids else {},
        }
        for name, kind in lists.items():
            export[name] = [by_kind[kind].model_dump(mode="json")] if ids else []
        yield json.dumps(export).encode()


ADDRESS_KEY = SigningKey.from_seed(b"addresses".ljust(32, b"-"))
AT_HOME = "https://broker.example"


def _address(data: bytes) -> None:
    """The payload of an answer with addresses, signed as a hostile broker would."""
    answer = sign_payload(ADDRESSES, data, [ADDRESS_KEY]).model_dump_json().encode()
    ours: dict[str, str] = {"broker": ADDRESS_KEY.party, "broker_url": AT_HOME}
    try:
        address = read_upload(answer, **ours, name="pack")
    except AddressRefused as error:
        can_be_told(error)
    else:
        assert address.url.lower().startswith("https://")
        assert not any(header in ("authorization", "host") for header in address.headers)
    try:
        runs = read_runs(answer, **ours, sizes=[1, 2, 3])
    except AddressRefused as error:
        can_be_told(error)
        return
    assert [number for run in runs for number in run.chunks] == [0, 1, 2]
    assert all(run.size_bytes > 0 and run.url.lower().startswith("https://") for run in runs)


def _address_seeds() -> Iterable[bytes]:
    url = "https://store.example/bucket/packs/aa?X-Amz-Signature=00"
    for there in (url, "http://169.254.169.254/", "https://127.1/", "https://[::1]/"):
        headers = {"if-none-match": "*", "content-length": "1", "x-amz-a": "b"}
        yield canonical_json({"name": "pack", "pack": "a" * 64, "url": there, "headers": headers})
        reads = [
            {"url": there, "offset_bytes": 0, "chunks": 2},
            {"url": there, "offset_bytes": 2**40, "chunks": 1},
        ]
        yield canonical_json({"reads": reads})


def _log_line(data: bytes) -> None:
    """A line of the log stream, as the renter's client reads it: the cursor is in it."""
    try:
        line = JobLogLine.model_validate_json(data)
    except ValueError:
        return
    assert JobLogLine.model_validate_json(line.model_dump_json()) == line


def _log_line_seeds() -> Iterable[bytes]:
    yield (
        JobLogLine(cursor=1, epoch=1, number=0, time_ms=NOW_MS, stream="stdout", text="größer")
        .model_dump_json()
        .encode()
    )
    yield b"\n"


# Cursors


@functools.cache
def _town() -> tuple[Door, str]:
    """Return a door that stays open, and a job with a log."""
    from tests.histories.town import Town

    town = Town()
    return Door(town).__enter__(), town.anna_job


def _query(data: bytes) -> None:
    """The first byte chooses a call of anna's, the rest is its query as it came, then signed."""
    door, job = _town()
    call = CURSORS[data[0] % len(CURSORS)] if data else CURSORS[0]
    path, _, fixed = call.replace("{job}", job).partition("?")
    query = fixed + data[1:].decode("latin-1")
    answer = door.ask("anna", "GET", f"{path}?{query}" if query else path)
    assert answer.status in (200, 404, 422), answer
    if answer.status != 200:
        problem = json.loads(answer.body)
        assert problem["code"], problem
    else:
        for line in answer.body.splitlines():
            json.loads(line or b"0")


CURSORS = (
    "/v1/jobs/{job}/logs?follow=false&", "/v1/jobs/{job}/events", "/v1/jobs", "/v1/log",
    "/v1/offers", "/v1/jobs/{job}/receipts", "/v1/jobs/{job}/logs?tail=3&run=1&",
)  # fmt: skip


def _query_seeds() -> Iterable[bytes]:
    for number in range(len(CURSORS)):
        for query in (
            "after=0",
            "after=9007199254740991",
            "after=-1",
            "after=1e3",
            "after=1&after=2",
            "state=running&name=x&limit=5",
            "since=3",
            "kind=gpu&region=home",
            "unsigned=true",
            "name=%00%ff",
            "after=%EF%BC%91",
        ):
            yield bytes([number]) + query.encode()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("json", _json, _json_seeds),
        Target("envelope", _envelope, _envelope_seeds),
        Target("document", _document, _document_seeds),
        Target("party", _party, _party_seeds),
        Target("frame", _frame, _frame_seeds),
        Target("session", _session, _session_seeds),
        Target("index", _index, _index_seeds),
        Target("done", _done, _done_seeds),
        Target("progress", _progress, _progress_seeds),
        Target("layout", _layout, _layout_seeds),
        Target("saved_file", _saved_file, _saved_file_seeds),
        Target("headers", _headers, _headers_seeds),
        Target("query", _query, _query_seeds),
        Target("export", _export, _export_seeds),
        Target("log_line", _log_line, _log_line_seeds),
        Target("address", _address, _address_seeds),
    )
}


def _every(data: bytes) -> None:
    """The first byte chooses the target."""
    targets = list(TARGETS.values())
    if data:
        targets[data[0] % len(targets)].run(data[1:])


def _every_seeds() -> Iterable[bytes]:
    for number, target in enumerate(TARGETS.values()):
        for seed in target.seeds():
            yield bytes([number]) + seed


EVERY = Target("every", _every, _every_seeds)
"""All of them in one process: a short run that costs one start."""


def named(name: str) -> Target:
    """Return the target of that name. Raises KeyError."""
    return EVERY if name == EVERY.name else TARGETS[name]
