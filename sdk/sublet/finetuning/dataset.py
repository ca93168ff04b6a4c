"""Labelled text from CSV or JSON lines, checked line by line.

Used twice: before a job is submitted, so that bad data costs nothing, and by train.py in the
container, where this file lies beside it. Standard library only.
"""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MAX_LABELS = 1000
MAX_FIELD_CHARACTERS = 1_000_000


class DataError(ValueError):
    """The data can't be trained on; the message names the line and what to do."""


@dataclass(frozen=True)
class Row:
    """One example, and the line of the file that it ends on."""

    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Summary:
    """What is in a data set."""

    rows: int
    labels: dict[str, int]
    duplicates: int
    contradictions: int
    """texts that stand in it with more than one label"""

    def __str__(self) -> str:
        shares = ", ".join(
            f"{label} {count} ({count / self.rows:.0%})" for label, count in self.labels.items()
        )
        text = f"{self.rows} rows; labels: {shares}; {self.duplicates} duplicates"
        if self.contradictions:
            text += f", {self.contradictions} texts under more than one label"
        return text


def read_rows(path: Path, text: str = "text", label: str = "label") -> list[Row]:
    """Return the examples of a .csv, .jsonl or .ndjson file, in its order. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; data is a .csv or .jsonl file")
    suffix = path.suffix.lower()
    content = _decode(path)
    if suffix == ".csv":
        rows = _from_csv(path, content, text, label)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _from_jsonl(path, content, text, label)
    else:
        raise DataError(f"{path.name}: it must end in .csv or .jsonl")
    if not rows:
        raise DataError(f"{path.name} holds no examples")
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise DataError(f"{path.name}: every {label!r} is {rows[0].label!r}; two are needed")
    if len(labels) > min(MAX_LABELS, len(rows) // 2):
        raise DataError(
            f"{path.name}: {len(labels)} different {label!r} in {len(rows)} rows; "
            "is it the right column? label= names it"
        )
    return rows


def summarize(rows: list[Row]) -> Summary:
    """Return what is in `rows`; labels are ordered by how often they occur."""
    counts = Counter(row.label for row in rows)
    by_text: dict[str, set[str]] = {}
    for row in rows:
        by_text.setdefault(row.text, set()).add(row.label)
    return Summary(
        rows=len(rows),
        labels=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        duplicates=len(rows) - len({(row.text, row.label) for row in rows}),
        contradictions=sum(len(labels) > 1 for labels in by_text.values()),
    )


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path.name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            f"convert it: iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from error
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise DataError(f"{path.name}, line {line}: a NUL character; is it a text file?")
    return content


def _from_csv(path: Path, content: str, text: str, label: str) -> list[Row]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        for column in (text, label):
            if header.count(column) != 1:
                times = "no" if column not in header else "more than one"
                raise DataError(
                    f"{path.name}, line 1: {times} column {column!r}; it has {', '.join(header)}"
                )
        at_text, at_label = header.index(text), header.index(label)
        for cells in reader:
            if not cells:
                continue  # a blank line, as many programs leave at the end
            if len(cells) != len(header):
                raise DataError(
                    f"{path.name}, line {reader.line_num}: {len(cells)} columns where the header "
                    f"has {len(header)}; put text with commas in quotes"
                )
            rows.append(_row(path, reader.line_num, cells[at_text], cells[at_label], text, label))
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: {error}") from error
    return rows


def _from_jsonl(path: Path, content: str, text: str, label: str) -> list[Row]:
    rows = []
    for line, raw in enumerate(content.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            example = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{path.name}, line {line}: not JSON ({error})") from error
        if not isinstance(example, dict):
            raise DataError(f"{path.name}, line {line}: each line must be a JSON object")
        for column in (text, label):
            if column not in example:
                has = ", ".join(example)
                raise DataError(f"{path.name}, line {line}: no {column!r}; it has {has}")
        if not isinstance(example[text], str):
            raise DataError(f"{path.name}, line {line}: {text!r} must be a string")
        value = example[label]
        if not isinstance(value, str | int):
            raise DataError(f"{path.name}, line {line}: {label!r} must be a string or an integer")
        name = value if isinstance(value, str) else json.dumps(value)
        rows.append(_row(path, line, example[text], name, text, label))
    return rows


def _row(path: Path, line: int, text: str, name: str, text_column: str, label_column: str) -> Row:
    for column, value in ((text_column, text), (label_column, name)):
        if not value.strip():
            raise DataError(f"{path.name}, line {line}: {column!r} is empty; fill it or drop it")
    return Row(text=text, label=name.strip(), line=line)
