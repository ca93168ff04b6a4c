"""sublet.yaml: what `sublet run` takes, and nothing else; every error has its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sublet import job_file
from sublet.errors import JobFileError
from sublet.job_file import load, read_job_file, schema
from sublet.job_file_draft import draft
from sublet.options import OPTIONS
from sublet.spec import JobSpec
from sublet.units import UnitError
from tests.sdk.test_options import LEAST, OTHER_VALUES

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "sublet.schema.json"


def written(folder: Path, text: str) -> Path:
    path = folder / "sublet.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str, profile: str = "", **environment: str) -> dict[str, Any]:
    return dict(read_job_file(written(folder, text), profile, environment))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_stand_in_a_file_and_means_the_same_there(
    tmp_path: Path, name: str
) -> None:
    value = OTHER_VALUES[name][0]
    text = yaml.safe_dump({**LEAST, name: value})
    found = read(tmp_path, text)
    jsonschema.validate(yaml.safe_load(text), schema())
    if name in ("code", "inputs"):
        (source,) = [value] if name == "code" else value
        assert str(tmp_path / source) in str(found[name])
        return
    one, other = JobSpec(**found), JobSpec(**{**LEAST, name: value})
    party = "ed25519-" + "0" * 64

    def document(spec: JobSpec) -> object:
        made = spec.document(renter=party, broker=party, now_ms=1, inputs=())
        return made.model_copy(update={"nonce": ""})

    assert document(one) == document(other)
    assert one.options["wait_for_offer"] == other.options["wait_for_offer"]


def test_a_profile_says_what_is_different_in_it(tmp_path: Path) -> None:
    text = """
image: i
budget: 5
env: {A: one}
profiles:
  big: {gpus: 8xH100, budget: 50}
  small: {gpus: cpu}
"""
    assert read(tmp_path, text) == {"image": "i", "budget": "5", "env": {"A": "one"}}
    assert read(tmp_path, text, "big")["budget"] == "50"
    with pytest.raises(JobFileError, match="has no profile 'huge'; there are: big, small"):
        read(tmp_path, text, "huge")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$HOME and $$5", "$HOME and $5"),
        ("${SEED}", "17"),
        ("a${SEED}b${SEED}", "a17b17"),
        ("${NOT:-x y}", "x y"),
        ("${NOT:-}", ""),
        ("${EMPTY:-x}", "x"),
        ("$${SEED}", "${SEED}"),
        ("${SEED:-no}", "17"),
    ],
)
def test_variables_come_from_the_environment(tmp_path: Path, text: str, value: str) -> None:
    found = read(tmp_path, f"env: {{A: '{text}'}}", SEED="17", EMPTY="")
    assert found["env"]["A"] == value


def test_what_a_variable_holds_is_no_yaml(tmp_path: Path) -> None:
    found = read(tmp_path, "name: ${N}\nimage: i", N="x\nbudget: 999")
    assert found == {"name": "x\nbudget: 999", "image": "i"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image: i\ngpsu: 1", "2: a job has no option 'gpsu'; did you mean gpus?"),
        ("image: i\nmax-price: 1", "2: a job has no option 'max-price'; did you mean max_price?"),
        ("profiles:\n  a:\n    budgt: 1", "3: a job has no option 'budgt'; did you mean budget?"),
        ("profiles:\n  a: {profiles: {}}", "2: a job has no option 'profiles'"),
        ("image: i\n\nimage: j", "3: image: it stands here twice; take one out"),
        ("image:", "1: image: it has no value; leave it out, or write ''"),
        ("image: [a]", "1: image: a plain value is expected here"),
        ("command: {a: b}", "1: command: a value, or a list is expected here"),
        ("command: [[a]]", "1: command: a plain value is expected here"),
        ("env: 5", "1: env: `name: value` lines is expected here"),
        ("egress: maybe", "1: egress: true or false is expected here"),
        ("a\nb: c", "2: no YAML: mapping values are not allowed here"),
        ("- image", "1: the file: write it as `name: value` lines"),
        ("", "it is empty; `sublet init` writes one"),
        ("image: i\n---\nimage: j", "2: no YAML: but found another document"),
        ("a: &x [1]\nb: *x", "1: anchors and aliases aren't read; write it out"),
        ("image: !!python/object:os.system x", "1: tags aren't read; leave"),
        ("a: " + "[" * 50 + "]" * 50, "1: it is nested too deep"),
        ("image: ${NOWHERE}", "1: NOWHERE is not set here; set it, or write ${NOWHERE:-default}"),
        ("image: ${", "1: '${' is never closed, or names no variable"),
        ("image: ${1}", "1: '${' is never closed, or names no variable"),
        ("? [a]\n: b", "1: the file: a name is expected here"),
        ("x: " + "y" * 70_000, "it has more than 65536 bytes"),
    ],
)
def test_each_mistake_is_told_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(JobFileError) as found:
        read(tmp_path, text)
    assert f"{tmp_path}/sublet.yaml:{says}".replace(":it ", ": it ") in str(found.value)


def test_a_bomb_of_aliases_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    with pytest.raises(JobFileError, match="anchors and aliases"):
        read(tmp_path, "\n".join(lines))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="No such file or directory; check the path"):
        read_job_file(tmp_path / "nowhere.yaml")
    (tmp_path / "odd.yaml").write_bytes(b"image: \xff")
    with pytest.raises(JobFileError, match="no UTF-8"):
        read_job_file(tmp_path / "odd.yaml")


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_nothing_that_is_no_job_gets_through(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    try:
        found = read_job_file(path, environment={})
    except JobFileError:
        return
    assert found.keys() <= OPTIONS.keys()


def test_an_option_that_is_refused_later_has_its_line_too(tmp_path: Path) -> None:
    file = load(written(tmp_path, "image: i\nbudget: five"))
    error = file.located(UnitError("budget: 'five' is no amount; write a number"))
    assert str(error) == f"{tmp_path}/sublet.yaml:2: budget: 'five' is no amount; write a number"
    other = UnitError("disk: too little")
    assert file.located(other) is other


def test_the_published_schema_is_what_the_options_say() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), (
        "stale: run  sublet init --schema > docs/sublet.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(schema())
    for wrong in ({"gpsu": 1}, {"profiles": {"a": {"b": 1}}}, {"env": 5}, {"egress": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())


# -- the commands --------------------------------------------------------------------------------


def sublet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sublet.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


def test_run_tells_the_line_of_a_bad_value_and_of_what_is_missing(tmp_path: Path) -> None:
    written(tmp_path, "image: python:3\nmax_price: 1\nbudget: 5\ndisk: lots\n")
    done = sublet(tmp_path, "run", "-f", "sublet.yaml", "-y")
    assert done.returncode != 0
    assert "error: sublet.yaml:4: disk: " in done.stderr
    done = sublet(tmp_path, "run", "-f", "sublet.yaml", "--disk", "more", "-y")
    assert "error: --disk: " in done.stderr, "what was given here is no line of the file's"
    written(tmp_path, "image: python:3\nmax_price: 1\n")
    done = sublet(tmp_path, "run", "-f", "sublet.yaml", "-y")
    assert done.returncode == 2
    assert "error: --budget: missing" in done.stderr
    assert "fix: give it here, or in a file that -f names" in done.stderr
    done = sublet(tmp_path, "run", "--max-price", "1", "--budget", "1")
    assert (done.returncode, "IMAGE: missing" in done.stderr) == (2, True)


def test_init_writes_a_file_that_can_be_read_and_never_over_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch\ntorch.save(model.state_dict(), 'checkpoints/last.pt')\n"
    )
    done = sublet(tmp_path, "init")
    assert done.returncode == 0, done.stderr
    found = read_job_file(tmp_path / "sublet.yaml")
    assert found["command"] == "python train.py"
    assert found["image"] == "pytorch/pytorch:latest"
    assert found["checkpoint"] == "checkpoints"
    assert found["code"] == str(tmp_path)
    jsonschema.validate(yaml.safe_load((tmp_path / "sublet.yaml").read_text()), schema())
    again = sublet(tmp_path, "init")
    assert again.returncode == 1
    assert "add --force to write over it" in again.stderr
    assert sublet(tmp_path, "init", "--force").returncode == 0
    assert json.loads(sublet(tmp_path, "init", "--schema").stdout) == schema()


def test_init_knows_a_trainer_and_a_dockerfile(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        "FROM --platform=linux/amd64 registry.example/base:1 AS a\n"
    )
    (tmp_path / "finetune.py").write_text(
        "from transformers import Trainer\nTrainer(args=Arguments(output_dir='out'))\n"
    )
    found = draft(tmp_path)
    assert found.image == "registry.example/base:1"
    assert "outputs: out\n" in found.text()
    assert read(tmp_path, found.text())["command"] == "python finetune.py"
    (tmp_path / "two").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "two" / name).touch()
    text = draft(tmp_path / "two").text()
    assert "command: python train.py  # nothing here is called so: name your script" in text


def test_the_module_needs_no_network_and_is_not_loaded_by_the_package() -> None:
    code = "import sublet, sys; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert job_file.FILE_NAME == "sublet.yaml"
