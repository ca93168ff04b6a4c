"""What a job can be asked for stands once: no surface can forget an option, or make one up."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ConfigDict, TypeAdapter

import sublet
from sublet import aio, finetuning
from sublet.cli.errors import CommandError, expected
from sublet.cli.job_options import add_job_options, given_options
from sublet.cli.parser import Parser
from sublet.client import Client, Job
from sublet.options import OPTIONS, completed, option_of_field
from sublet.options_docs import table, updated
from sublet.spec import JobSpec
from sublet.units import UnitError
from sublet_contracts.documents import Input, Resources
from sublet_contracts.documents import Job as JobDocument
from tests.contracts.samples import INDEX

README = Path(__file__).resolve().parents[2] / "sdk" / "README.md"

OTHER_VALUES: dict[str, tuple[Any, list[str]]] = {
    "image": ("registry.example/other:1", ["registry.example/other:1"]),
    "command": (["python3", "other.py"], ["registry.example/image:1", "python3", "other.py"]),
    "max_price": ("0.41", ["--max-price", "0.41"]),
    "budget": ("6", ["--budget", "6"]),
    "accept_receipts": ("2", ["--accept-receipts", "2"]),
    "gpus": ("2xA100", ["--gpus", "2xA100"]),
    "memory": ("9GB", ["--memory", "9GB"]),
    "disk": ("11GB", ["--disk", "11GB"]),
    "cpus": ("2", ["--cpus", "2"]),
    "region": ("elsewhere", ["--region", "elsewhere"]),
    "hardware_class": ("a100", ["--hardware-class", "a100"]),
    "egress": (True, ["--egress"]),
    "user": ("1000:100", ["--user", "1000:100"]),
    "shm_size": ("2GB", ["--shm-size", "2GB"]),
    "workdir": ("/srv", ["--workdir", "/srv"]),
    "code": ("src", ["--code", "src"]),
    "inputs": ({"data.csv": "/data/data.csv"}, ["--input", "data.csv:/data/data.csv"]),
    "outputs": ("/out", ["--outputs", "/out"]),
    "checkpoint": (["ckpts", "/state"], ["--checkpoint", "ckpts", "--checkpoint", "/state"]),
    "env": ({"SEED": "17"}, ["-e", "SEED=17"]),
    "name": ("other", ["--name", "other"]),
    "checkpoint_every": ("3m", ["--checkpoint-every", "3m"]),
    "patience": ("21s", ["--patience", "21s"]),
    "stop_grace": ("31s", ["--stop-grace", "31s"]),
    "stall": ("30m", ["--stall", "30m"]),
    "start_within": ("6d", ["--start-within", "6d"]),
    "wait_for_offer": (False, ["--no-wait"]),
}
"""For each option a value that isn't its default, and the same on the command line."""

LEAST = {"image": "registry.example/image:1", "max_price": "0.40", "budget": "5"}

SET_BY_THE_CLIENT = {"renter", "broker", "nonce", "issued_ms", "resources"}
"""Fields of the document that no option decides."""


def document(**options: Any) -> JobDocument:
    """Return the document of a job, with what changes each time left out."""
    spec = JobSpec(**{**LEAST, **options})
    inputs = tuple(
        Input(destination=path, kind="file", index_digest=INDEX, total_bytes=1)
        for path in spec.inputs.values()
    )
    party = "ed25519-" + "0" * 64
    made = spec.document(renter=party, broker=party, now_ms=1, inputs=inputs)
    return made.model_copy(update={"nonce": ""})


@pytest.mark.parametrize("name", [*OPTIONS, *(OTHER_VALUES.keys() - OPTIONS.keys())])
def test_every_option_decides_the_fields_that_it_says_and_no_others(name: str) -> None:
    assert name in OPTIONS, f"{name} is no option any more: take it out of OTHER_VALUES"
    assert name in OTHER_VALUES, f"{name}: give a value that isn't its default in OTHER_VALUES"
    usual, other = document(), document(**{name: OTHER_VALUES[name][0]})
    changed = {
        field
        for kind, before, after in (
            (JobDocument, usual, other),
            (Resources, usual.resources, other.resources),
        )
        for field in kind.model_fields
        if getattr(before, field) != getattr(after, field)
    } - {"resources"}
    derived = {
        "image": {"name"},
        "budget": {"accept_receipts_up_to_ucr"},
        "code": {"workdir"},  # and one of the inputs, which is sent first
    }.get(name, set())
    expected_fields = set(OPTIONS[name].fields) | derived
    # The one value for --gpus doesn't change all that --gpus decides.
    assert changed == expected_fields - ({"device_kind", "device_memory_bytes"} - changed)


def test_every_field_of_the_document_is_decided_by_exactly_one_option() -> None:
    decided = [field for option in OPTIONS.values() for field in option.fields]
    fields = {*JobDocument.model_fields, *Resources.model_fields} - SET_BY_THE_CLIENT
    forgotten = fields - set(decided)
    assert not forgotten, f"no option in sublet/options.py decides {', '.join(sorted(forgotten))}"
    unknown = set(decided) - fields
    assert not unknown, f"documents.py has no field {', '.join(sorted(unknown))}"
    assert sorted(decided) == sorted(fields)


@pytest.mark.parametrize(
    "function",
    [
        *(sublet.run, Client.run, aio.run, aio.AsyncClient.run),
        *(sublet.finetune, aio.finetune),
    ],
)
def test_every_function_that_submits_takes_and_explains_every_option(
    function: Callable[..., object],
) -> None:
    parameters = inspect.signature(function).parameters
    preset = finetuning.PRESET if "base" in parameters else {}
    for name, option in OPTIONS.items():
        if option.positional:
            # The preset has a command of its own, and an image.
            assert name in parameters or (preset and name == "command")
            continue
        default = parameters[name].default
        if option.required:
            assert default is inspect.Parameter.empty
        else:
            assert default == preset.get(name, option.default)
        assert parameters[name].annotation == option.type
        assert f"\n    {name} " in (function.__doc__ or "")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_is_of_its_options_type(name: str) -> None:
    option = OPTIONS[name]
    assert option.help
    if not option.required:
        TypeAdapter(option.type, config=ConfigDict(strict=True)).validate_python(option.default)


def of_command_line(arguments: list[str]) -> dict[str, object]:
    """Return what the options of `sublet run` say, as it passes them on."""
    parser = Parser("run", "")
    add_job_options(parser)
    return dict(given_options(parser.parse_args(arguments)))


@pytest.mark.parametrize("name", [n for n, option in OPTIONS.items() if not option.positional])
def test_every_option_is_on_the_command_line(name: str) -> None:
    value, arguments = OTHER_VALUES[name]
    needed = [
        word
        for required in ("max_price", "budget")
        if required != name
        for word in OTHER_VALUES[required][1]
    ]
    assert of_command_line([*needed, *arguments])[name] == value
    # What isn't given isn't passed on, so that one place knows the defaults.
    given = of_command_line([*OTHER_VALUES["max_price"][1], *OTHER_VALUES["budget"][1]])
    assert given.keys() == {"max_price", "budget"}


@pytest.mark.parametrize("command", ["run", "finetune"])
def test_every_option_is_in_the_commands_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sublet.cli.main", command, "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    for option in OPTIONS.values():
        shown = option.metavar if option.positional else option.flag
        if not (command == "finetune" and option.name in ("image", "command")):
            assert shown in done.stdout, option.name


def test_flags_are_unlike_each_other() -> None:
    flags = [flag for option in OPTIONS.values() for flag in (option.flag, option.short_flag)]
    used = [flag for flag in flags if flag]
    assert len(used) == len(set(used))


def test_an_unknown_or_missing_option_is_named() -> None:
    with pytest.raises(TypeError, match="no option 'gpsu'; did you mean 'gpus'"):
        completed({**LEAST, "gpsu": 1})
    with pytest.raises(TypeError, match="needs max_price, budget"):
        completed({"image": "i"})
    assert completed(LEAST).keys() == OPTIONS.keys()


def test_an_error_about_a_field_names_the_option_that_decides_it() -> None:
    for name, option in OPTIONS.items():
        for field in option.fields:
            assert option_of_field(field) is option, name
    said = expected(UnitError("stop_grace_ms: too short; make it longer"))
    assert isinstance(said, CommandError)
    assert (said.what, said.fix) == ("--stop-grace: too short", "make it longer")


def test_the_readmes_table_is_what_the_list_says_today() -> None:
    page = README.read_text(encoding="utf-8")
    assert updated(page) == page, "stale: run  python -m sublet.options_docs sdk/README.md"
    assert len(list(table())) == len(OPTIONS) + 2
    with pytest.raises(ValueError, match="lacks a line"):
        updated("no marks")


@pytest.mark.parametrize(("original", "mirror"), [(Client, aio.AsyncClient), (Job, aio.AsyncJob)])
def test_aio_has_every_method_with_the_same_arguments(original: type, mirror: type) -> None:
    for name in {*aio.public_names(original), "__init__"}:
        if mirror is aio.AsyncJob and name == "__init__":
            continue
        method, twin = vars(original)[name], vars(mirror)[name]
        if isinstance(method, property):
            assert isinstance(twin, property), name
            continue
        ours, theirs = inspect.signature(method), inspect.signature(twin)
        assert [str(p) for p in ours.parameters.values()] == [
            str(p) for p in theirs.parameters.values()
        ], name


def test_a_method_that_aio_lacks_is_an_error_when_it_is_imported() -> None:
    class Original:
        def known(self) -> None:
            """Here and there."""

        def forgotten(self) -> None:
            """Only here."""

    class Mirror:
        async def known(self) -> None:
            """Here and there."""

    with pytest.raises(TypeError, match="Mirror lacks forgotten of Original"):
        aio.mirrors(Original)(Mirror)


SCRIPT = """
import sublet

sublet.run("image", max_price=1, budget=1, gpus="2x24GB", env={"A": "1"})
sublet.run("image", max_price=1, budget=1, gpsu=1)
sublet.run("image", max_price=1)
sublet.run("image", max_price=1, budget=1, memory=["8GB"])
sublet.Client().run("image", max_price=1, budget=1, patiense="9s")
sublet.finetune("minilm", "data.csv", max_price=1, budget=1, regoin="x")


async def main() -> None:
    job = await sublet.aio.run("image", max_price=1, budget=1, egres=True)
    reveal_type(await job.view())
    async with sublet.aio.AsyncClient() as client:
        await client.run("image", max_price=1, budget=1, disc="1GB")
        reveal_type(await client.broker)
"""


def test_a_type_checker_knows_every_option_and_catches_a_misspelt_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)],
        cwd=README.parents[1],
        check=False,
        capture_output=True,
        text=True,
    )
    shown = done.stdout + done.stderr
    for line, words in (
        (5, 'Unexpected keyword argument "gpsu"'),
        (6, 'Missing named argument "budget"'),
        (7, 'incompatible type "list[str]"'),
        (8, 'Unexpected keyword argument "patiense"'),
        (9, 'Unexpected keyword argument "regoin"'),
        (13, 'Unexpected keyword argument "egres"'),
        (14, 'Revealed type is "sublet_contracts.api.JobView"'),
        (16, 'Unexpected keyword argument "disc"'),
        (17, 'Revealed type is "str"'),
    ):
        found = [said for said in shown.splitlines() if f"script.py:{line}:" in said]
        assert any(words in said for said in found), f"line {line}: {words}\n{shown}"
    assert "script.py:4:" not in shown
