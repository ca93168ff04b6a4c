"""Writes contracts/README.md: python -m sublet_contracts.describe > contracts/README.md

Nothing in that page is written twice: fields, limits and meanings come from the models, diagrams
from the state tables, the faults from the table of reasons. A test fails when the page is stale.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sublet_contracts import states
from sublet_contracts.auth import MAX_REQUEST_SKEW_MS, REQUEST_TYPE
from sublet_contracts.documents import (
    DOCUMENTS,
    Device,
    Document,
    Input,
    Offer,
    Resources,
    Settlement,
    Transfer,
)
from sublet_contracts.documents import Job as JobDocument
from sublet_contracts.encoding import MAX_DEPTH, MAX_DOCUMENT_BYTES, MAX_INTEGER
from sublet_contracts.job_warnings import WARNINGS
from sublet_contracts.keys import PARTY_PATTERN
from sublet_contracts.reasons import MEANINGS
from sublet_contracts.session import HANDSHAKE, MAX_SKEW_MS, SessionProof
from sublet_contracts.tree import (
    CHUNK_BYTES,
    MAX_FILES,
    MAX_INDEX_BYTES,
    Chunk,
    TreeFile,
    TreeIndex,
)
from sublet_contracts.versions import versions_of
from sublet_contracts.wire import (
    MAX_FRAME_BYTES,
    MESSAGES,
    DeviceUsage,
    Heartbeat,
    HeldLease,
    LogLine,
    Logs,
    LogState,
    LogStates,
    Message,
    RunCadence,
    RunReport,
    RunStall,
    RunUsage,
    Welcome,
)

_KINDS: tuple[type[Document], ...] = (*DOCUMENTS, SessionProof)

_PARTS: Mapping[type[BaseModel], tuple[type[BaseModel], ...]] = {
    Offer: (Device,),
    JobDocument: (Resources, Input),
    Settlement: (Transfer,),
    Welcome: (HeldLease,),
    Heartbeat: (RunReport, RunUsage, DeviceUsage, RunStall, RunCadence),
    Logs: (LogLine,),
    LogStates: (LogState,),
}
"""What each model holds besides plain fields."""

_TEXT_BY_PATTERN = {
    PARTY_PATTERN: "party id",
    r"^[0-9a-f]{64}$": "SHA-256, 64 hex digits",
    r"^blake3:[0-9a-f]{64}$": "`blake3:` and 64 hex digits",
    r"^[0-9a-f]{16,64}$": "16 to 64 hex digits",
    r"^[A-Za-z0-9][A-Za-z0-9._ /:@+-]*$": "plain name",
    r"^[a-z0-9][a-z0-9.-]*$": "label",
    r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$": "device id",
    r"^[A-Za-z0-9._:-]+$": "message id",
}

# The first ending that fits names the unit.
_UNITS = (
    ("_ucr_per_device_hour", "µcr per device-hour"),
    ("_ucr", "µcr"),
    ("device_ms", "device-ms"),
    ("_ms", "ms"),
    ("_bytes", "bytes"),
    ("_bps", "1/10 000"),
    ("_millis", "1/1 000 core"),
    ("_mw", "mW"),
)

_DIAGRAMS = (
    ("State of a job", states.JobState, states.to_mermaid(states.JOB)),
    ("State of a run, observed", states.RunState, states.to_mermaid(states.RUN)),
    ("State of a run, desired", states.Desired, states.to_mermaid(states.DESIRED)),
    ("State of a lease", states.LeaseState, states.to_mermaid(states.LEASE)),
    ("State of a checkpoint", states.CheckpointState, states.to_mermaid(states.CHECKPOINT)),
    ("State of a receipt chain", states.ChainState, states.to_mermaid(states.CHAIN)),
)


def page() -> str:
    """Return the whole of contracts/README.md."""
    sections = (_opening(), _documents(), _wire(), _session(), _trees(), _requests(), _states())
    return (
        "\n\n".join("\n".join(section) for section in sections)
        + "\n\n"
        + _reasons()
        + "\n\n"
        + _warnings()
        + "\n"
    )


def _opening() -> Iterator[str]:
    yield "<!-- Generated: python -m sublet_contracts.describe > contracts/README.md -->"
    yield "# contracts"
    yield ""
    yield (
        "What broker, agent and renter have agreed on: the signed documents, the messages between"
        " broker and agent, and the rules that each side computes for itself. Only pydantic,"
        " cryptography and blake3 are needed here, and nothing of ours is imported, so anyone can"
        " check a bill with this package alone."
    )
    yield ""
    yield "**Contents:** [modules](#modules) · [documents](#documents) ·"
    yield "[wire messages](#wire-messages) · [session](#the-sessions-table) · [trees](#trees) ·"
    yield "[signed requests](#signed-requests) · [states](#states) · [reasons](#reasons) · "
    yield "[warnings](#warnings)"
    yield ""
    yield "## Modules"
    yield ""
    folder = Path(__file__).parent
    rows = []
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            rows.append((f"[`{path.name}`](sublet_contracts/{path.name})", _first_sentence(path)))
    yield from _table(("file", "what it is"), rows)


def _documents() -> Iterator[str]:
    yield "## Documents"
    yield ""
    yield (
        "A document is JSON in a [DSSE](https://github.com/secure-systems-lab/dsse) envelope,"
        " signed with Ed25519. The exact bytes are signed; they are verified before they are"
        " parsed and never written again. A document's id is the SHA-256 of DSSE's encoding of"
        " type and payload, so a further signature leaves it as it is."
    )
    yield ""
    yield (
        f"Parsing is strict: at most {_grouped(MAX_DOCUMENT_BYTES)} bytes and {MAX_DEPTH} levels,"
        " no duplicate key, no float, no NaN, no unknown field, no conversion between types, and"
        f" no integer beyond 2^53 - 1 ({_grouped(MAX_INTEGER)}). Money is whole micro-credits"
        " (µcr, a millionth of a credit), time is whole milliseconds, and ms since 1970 where a"
        " point in time is meant. A device-ms is one device for one millisecond."
    )
    yield ""
    summary = []
    for kind in _KINDS:
        link = f"[{kind.KIND}](#{kind.KIND})"
        summary.append((link, kind.SIGNED_BY, f"`{kind.payload_type()}`", str(kind.VERSION)))
    yield from _table(("document", "signed by", "payload type", "version"), summary)
    for kind in _KINDS:
        yield ""
        yield from _document(kind)


def _document(kind: type[Document]) -> Iterator[str]:
    yield f"### {kind.KIND}"
    yield ""
    yield _sentence(kind)
    yield ""
    yield f"Signed by {kind.SIGNED_BY}. Type `{kind.payload_type()}`, version {kind.VERSION}."
    yield ""
    yield from _fields(kind)
    for number, model in versions_of(kind).items():
        if model is not kind:
            yield ""
            yield (
                f"Version {number}, `{model.payload_type()}`, is still read, and is written for who"
                f" reads no newer one.{_difference(model, kind)}"
            )


def _difference(older: type[Document], newer: type[Document]) -> str:
    words = ""
    for verb, one, other in (("lacks", newer, older), ("has besides", older, newer)):
        names = [f"`{name}`" for name in one.model_fields if name not in other.model_fields]
        words += f" It {verb} {', '.join(names)}." if names else ""
    return words


def _wire() -> Iterator[str]:
    yield "## Wire messages"
    yield ""
    yield (
        "One JSON text frame each, over the websocket that the agent opens:"
        ' `{"type": ..., "mid": ... or null, "body": {...}}`, at most'
        f" {_grouped(MAX_FRAME_BYTES)} bytes. A *reliable* message has a `mid`: its sender keeps"
        " it on disk and sends it again, on this connection or the next, until an `ack` names it;"
        " its receiver acts on it once. Another has none and may be lost."
    )
    yield ""
    rows = [
        (f"[{m.TYPE}](#{m.TYPE})", m.SENDER, "yes" if m.RELIABLE else "no", _sentence(m))
        for m in MESSAGES.values()
    ]
    yield from _table(("message", "sender", "reliable", "meaning"), rows)
    for message in MESSAGES.values():
        yield ""
        yield from _message(message)


def _message(message: type[Message]) -> Iterator[str]:
    reliable = "reliable" if message.RELIABLE else "may be lost"
    sender = "either side" if message.SENDER == "both" else f"the {message.SENDER}"
    yield f"### {message.TYPE}"
    yield ""
    yield f"{_sentence(message)} (From {sender}; {reliable}.)"
    yield ""
    yield from _fields(message)


def _session() -> Iterator[str]:
    yield "## The session's table"
    yield ""
    yield (
        "Broker and agent run the same table. What is not in it closes the session, and says"
        f" why. Clocks that differ by more than {_grouped(MAX_SKEW_MS)} ms are refused here,"
        " where the cause can be named."
    )
    yield ""
    rows = [(before, who, kind, after) for (before, who, kind), after in HANDSHAKE.items()]
    yield from _table(
        ("phase", "who sends", "message", "next phase"),
        [*rows, ("live", "either", "any other message that is its own", "live")],
    )
    yield ""
    yield "```mermaid"
    yield "stateDiagram-v2"
    for (before, who, kind), after in HANDSHAKE.items():
        yield f"    {before} --> {after}: {who} sends {kind}"
    yield "    closed --> [*]"
    yield "```"


def _trees() -> Iterator[str]:
    yield "## Trees"
    yield ""
    yield (
        "A folder (checkpoint, input, outputs) is listed by a *tree index*, a blob of JSON that"
        " documents name by its digest. Files are cut into chunks of at most"
        f" {_grouped(CHUNK_BYTES)} bytes, named by their digest, so what is unchanged moves"
        f" once. At most {_grouped(MAX_FILES)} files and {_grouped(MAX_INDEX_BYTES)} bytes of"
        " index. Paths are relative and plain: no link, no `..`, nothing absolute."
    )
    for model in (TreeIndex, TreeFile, Chunk):
        yield ""
        yield f"**{model.__name__}** {_sentence(model)}"
        yield ""
        yield from _fields(model)


def _requests() -> Iterator[str]:
    yield "## Signed requests"
    yield ""
    yield (
        "An HTTP request is signed by the party's own key over DSSE's encoding of"
        f" `{REQUEST_TYPE}` and the JSON of the fields below, sorted and without white space. It"
        f" is refused when its time is more than {_grouped(MAX_REQUEST_SKEW_MS)} ms off, or when"
        " its nonce was seen before."
    )
    yield ""
    yield from _table(
        ("field", "where it travels", "meaning"),
        (
            (
                "`body_digest`",
                "the body itself",
                "`sha256:` and the hash of the body, also of an empty one; where the address names"
                " what is sent by its digest, that digest",
            ),
            ("`broker`", "nowhere", "the party id of the one broker that it is meant for"),
            ("`idempotency_key`", "`Idempotency-Key`", "empty where there is none"),
            ("`method`", "the request line", "in capitals"),
            ("`nonce`", "`Sublet-Nonce`", "32 hex digits, never used twice"),
            ("`party`", "`Sublet-Party`", "who signs; the signature is in `Sublet-Signature`"),
            ("`target`", "the request line", "path and query, exactly as sent"),
            ("`time_ms`", "`Sublet-Time-Ms`", "ms since 1970"),
        ),
    )


def _states() -> Iterator[str]:
    yield "## States"
    yield ""
    yield "Terminal is final; an edge that is not drawn does not happen."
    for title, kind, diagram in _DIAGRAMS:
        yield ""
        yield f"### {title}"
        yield ""
        yield _sentence(kind)
        yield ""
        yield "```mermaid"
        yield diagram
        yield "```"


def _reasons() -> str:
    lines = [
        "## Reasons",
        "",
        "Every ending has one of these. *Pays* says which device time is payable: all, or only that"
        " up to the newest durable checkpoint. *Then* says what becomes of the job; *evidence*,"
        " what must have been seen before anybody may give the reason.",
        "",
    ]
    rows = [(f"`{r}`", m.fault, m.next, m.pays, m.says, m.evidence) for r, m in MEANINGS.items()]
    return "\n".join(
        (*lines, *_table(("reason", "fault", "then", "pays", "in words", "evidence"), rows))
    )


def _warnings() -> str:
    lines = [
        "## Warnings",
        "",
        "What the renter of a running job is told, while it can still be helped. Each has an event"
        " when it *begins* and when it is *over*, at the latest with its run; a view of the job has"
        " those that stand, with their facts as they are at that moment.",
        "",
    ]
    rows = [
        (f"`{code}`", w.mark, w.begins, w.ends, ", ".join(f"`{fact}`" for fact in w.facts))
        for code, w in WARNINGS.items()
    ]
    heads = ("warning", "mark", "it begins when", "it is over when", "facts")
    return "\n".join((*lines, *_table(heads, rows)))


def _fields(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema()
    rows = []
    for name, field in schema.get("properties", {}).items():
        rows.append((f"`{name}`", type_words(field, schema), unit(name), meaning(name, field)))
    yield from _table(("field", "type", "unit", "meaning"), rows)
    for part in _PARTS.get(model, ()):
        yield ""
        yield f"**{part.__name__}.** {_sentence(part)}"
        yield ""
        yield from _fields(part)


def type_words(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the type of a JSON schema's `field` in words, with its limits."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        target = schema["$defs"][name]
        if "enum" in target:
            return f"a [{name.lower()}](#reasons)"
        return "signed document" if name == "Envelope" else name
    if "anyOf" in field:
        return " or ".join(type_words(option, schema) for option in field["anyOf"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    match field.get("type"):
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case "integer":
            return "integer" + _bounds(field.get("minimum"), field.get("maximum"))
        case "number":
            return "number"
        case "array":
            items = type_words(field["items"], schema)
            size = _bounds(field.get("minItems"), field.get("maxItems")).removeprefix(", ")
            return f"list ({size}) of {items}" if size else f"list of {items}"
        case "object":
            # A map whose keys must match is described by the pattern of its keys.
            by_key = field.get("patternProperties", {})
            values = type_words(
                field.get("additionalProperties") or next(iter(by_key.values())), schema
            )
            size = _bounds(None, field.get("maxProperties")).removeprefix(", ")
            return f"map ({size}) of name to {values}" if size else f"map of name to {values}"
        case _:
            return _string(field)


def _string(field: Mapping[str, Any]) -> str:
    pattern = field.get("pattern")
    if field.get("format") == "document-id":
        return "document id"
    words = _TEXT_BY_PATTERN.get(pattern, "text") if pattern else "text"
    if "maxLength" in field:
        words += f" up to {_grouped(field['maxLength'])} characters"
    return words


def _bounds(least: int | None, most: int | None) -> str:
    if most in (None, MAX_INTEGER):
        return f", at least {_grouped(least)}" if least else ""
    if not least:
        return f", at most {_grouped(most)}"
    return f", {_grouped(least)} to {_grouped(most)}"


def unit(name: str) -> str:
    """Return the unit that stands in a field's name, or nothing."""
    return next((words for ending, words in _UNITS if name.endswith(ending)), "")


def meaning(name: str, field: Mapping[str, Any]) -> str:
    """Return what a field means, with its default. Raises ValueError if its model doesn't say."""
    words = str(field.get("description", ""))
    if not words:
        raise ValueError(f"{name} has no description; add one to its model")
    default = field.get("default")
    if default not in (None, "", {}):
        words += f" (default {str(default).lower() if isinstance(default, bool) else default})"
    return words


def _first_sentence(path: Path) -> str:
    documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _flat(documentation.split("\n\n")[0])


def _sentence(model: type) -> str:
    return _flat(model.__doc__ or "")


def _flat(text: str) -> str:
    return " ".join(text.split())


def _grouped(number: int | None) -> str:
    return f"{number:,}".replace(",", " ")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    titles = list(head)
    yield "| " + " | ".join(titles) + " |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    sys.stdout.write(page())
