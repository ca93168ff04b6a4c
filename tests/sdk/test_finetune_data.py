"""Data is checked before a job costs anything, and the preset says what it submits."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from sublet.demo.data import ROWS, DataUnavailable, to_csv
from sublet.finetuning import finetune
from sublet.finetuning.dataset import DataError, read_rows, summarize

GOOD = "text,label\n" + "".join(f"example {i},{'ab'[i % 2]}\n" for i in range(6))


def write(tmp_path: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_and_json_lines_read_the_same(tmp_path: Path) -> None:
    as_csv = write(tmp_path, 'id,body,kind\n1,"a, ""b""\nc",x\n2,d,y\n3,e,x\n4,f,y\n')
    lines = "".join(
        f'{{"body": "{text}", "kind": "{kind}"}}\n'
        for text, kind in ((r"a, \"b\"\nc", "x"), ("d", "y"), ("e", "x"), ("f", "y"))
    )
    as_json = write(tmp_path, "\ufeff" + lines, "data.jsonl")
    first, second = (read_rows(path, "body", "kind") for path in (as_csv, as_json))
    assert [(r.text, r.label) for r in first] == [(r.text, r.label) for r in second]
    assert first[0].text == 'a, "b"\nc'
    assert first[1].line == 4


def test_the_summary_counts_labels_duplicates_and_contradictions(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, GOOD + "same,a\nsame,a\nsame,b\n"))
    summary = summarize(rows)
    assert (summary.rows, summary.labels) == (9, {"a": 5, "b": 4})
    assert (summary.duplicates, summary.contradictions) == (1, 1)
    assert str(summary).startswith("9 rows; labels: a 5 (56%), b 4 (44%); 1 duplicates")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.csv", "text,kind\na,b\n", "line 1: no column 'label'; it has text, kind"),
        ("data.csv", "text,label,text\na,b,c\n", "more than one column 'text'"),
        ("data.csv", GOOD + "  ,a\n", "line 8: 'text' is empty"),
        ("data.csv", GOOD + "x,\n", "line 8: 'label' is empty"),
        ("data.csv", GOOD + "one, two,a\n", "line 8: 3 columns where the header has 2"),
        ("data.csv", GOOD.encode() + b"caf\xe9,a\n", "line 8: not UTF-8"),
        ("data.csv", GOOD + "a\0,b\n", "line 8: a NUL character"),
        ("data.csv", GOOD + '"open,a\n', "line 8"),
        ("data.csv", "text,label\n", "no examples"),
        ("data.csv", "", "no column 'text'"),
        ("data.csv", "text,label\na,x\nb,x\n", "every 'label' is 'x'"),
        ("data.csv", "text,label\na,x\nb,y\nc,z\n", "is it the right column"),
        ("data.jsonl", '{"text": "a", "label": 1}\n{"text": "a"\n', "line 2: not JSON"),
        ("data.jsonl", '{"text": "a", "label": 1}\n[1]\n', "line 2: each line must be"),
        ("data.jsonl", '{"text": "a"}\n', "line 1: no 'label'; it has text"),
        ("data.jsonl", '{"text": 5, "label": 1}\n', "line 1: 'text' must be a string"),
        ("data.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: 'label' must be"),
        ("data.txt", "a", "must end in .csv or .jsonl"),
    ],
)
def test_bad_data_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as refused:
        read_rows(write(tmp_path, content, name))
    assert said in str(refused.value)
    assert name in str(refused.value)


def test_the_preset_submits_scripts_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, GOOD)
    submitted: dict[str, Any] = {}

    def run(**options: Any) -> Any:
        submitted.update(options)
        (scripts,) = (src for src, dst in options["inputs"].items() if dst == "/job")
        submitted["scripts"] = sorted(path.name for path in Path(scripts).iterdir())
        return "job"

    job: Any = finetune(
        "minilm",
        data,
        max_price=0.4,
        budget=5,
        max_steps=9,
        gpus="cpu",
        image="i",
        run=run,
        checkpoint_every="2m",
    )
    assert job == "job"
    assert "6 rows" in capsys.readouterr().out
    assert submitted["scripts"] == ["dataset.py", "train.py"]
    assert submitted["inputs"][str(data)] == "/data/data.csv"
    command = submitted["command"]
    assert command[:4] == ["python3", "/job/train.py", "--base", "minilm"]
    assert command[command.index("--max-steps") + 1] == "9"
    expected = {"gpus": "cpu", "image": "i", "outputs": "/out", "checkpoint_every": "2m"}
    assert {key: submitted[key] for key in expected} == expected


def test_a_bad_base_or_method_is_refused_before_submission(tmp_path: Path) -> None:
    data = write(tmp_path, GOOD)

    def run(**options: Any) -> Any:
        raise AssertionError("submitted")

    with pytest.raises(ValueError, match="no such folder"):
        finetune("nowhere", data, max_price=1, budget=1, run=run)
    with pytest.raises(ValueError, match="only 'lora'"):
        finetune("minilm", data, method="full", max_price=1, budget=1, run=run)


def test_rated_snippets_become_labelled_rows() -> None:
    lines = [f"{i}\t{(-1) ** i * 0.5}\ttext, number {i}\r" for i in range(ROWS)]
    rows = list(csv.reader(io.StringIO(to_csv("\n".join(lines) + "\n"))))
    assert rows[:3] == [
        ["text", "label"],
        ["text, number 0", "positive"],
        ["text, number 1", "negative"],
    ]
    assert len(rows) == ROWS + 1
    with pytest.raises(DataUnavailable, match="not 10605"):
        to_csv("1\t0.5\tonly one\n")
    with pytest.raises(DataUnavailable, match="line 1"):
        to_csv("1\t0.5\n")
