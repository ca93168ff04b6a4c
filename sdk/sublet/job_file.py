"""A job as a file, sublet.yaml: what `sublet run` takes, and nothing else.

    image: registry.example/torch:2
    command: python train.py
    code: .
    max_price: 0.40
    budget: 5
    env:
      SEED: ${SEED:-17}
    profiles:
      big: {gpus: 8xH100, budget: 50}

Every key but `profiles` is an option of sublet/options.py, written as on the command line. A
profile says what is different in it. `${NAME}` is taken from the environment, `${NAME:-default}` if
it is set there, and `$$` is one `$`. Paths are relative to the file's folder.

A file may be a stranger's: its size and depth are bounded; anchors, aliases and tags are refused,
so nothing in it can grow or make objects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

import yaml

from sublet.errors import JobFileError
from sublet.options import OPTIONS, JobDescription, Option
from sublet.units import UnitError

FILE_NAME = "sublet.yaml"
PROFILES = "profiles"
MAX_FILE_BYTES = 64 * 1024
MAX_DEPTH = 8
_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)(:-((?:[^}\\]|\\.)*))?\}|\{)")


@dataclass(frozen=True)
class JobFile:
    """What a file says, with one of its profiles laid over it."""

    path: Path
    options: Mapping[str, object]
    lines: Mapping[str, int]
    """option -> where it stands"""

    def located(self, error: UnitError) -> Exception:
        """Return an error about an option with its place in the file, if it comes from there."""
        name = str(error).partition(":")[0]
        if name not in self.lines:
            return error
        return JobFileError(f"{self.path}:{self.lines[name]}: {error}")


def read_job_file(
    path: str | os.PathLike[str],
    profile: str = "",
    environment: Mapping[str, str] | None = None,
) -> JobDescription:
    """Return the job that a file describes, for `sublet.run(**...)`. `environment`: this process's
    unless given. Raises JobFileError."""
    return cast(JobDescription, dict(load(Path(path), profile, environment).options))


def load(path: Path, profile: str = "", environment: Mapping[str, str] | None = None) -> JobFile:
    """Read a file. Raises JobFileError."""
    reader = _Reader(path, os.environ if environment is None else environment)
    top = reader.mapping(reader.document(), "the file")
    profiles: Mapping[str, tuple[yaml.Node, yaml.Node]] = {}
    if PROFILES in top:
        profiles = reader.mapping(top.pop(PROFILES)[1], PROFILES)
    chosen: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    every = {name: reader.mapping(node, name) for name, (_, node) in profiles.items()}
    for entries in (top, *every.values()):
        reader.check_names(entries)
    if profile:
        if profile not in every:
            known = ", ".join(every) or "none"
            raise JobFileError(f"{path}: it has no profile {profile!r}; there are: {known}")
        chosen = every[profile]
    options: dict[str, object] = {}
    lines: dict[str, int] = {}
    for name, (key, node) in {**top, **chosen}.items():
        options[name] = reader.value(OPTIONS[name], node)
        lines[name] = key.start_mark.line + 1
    return JobFile(path, _from_its_folder(options, path.parent), lines)


class _Reader:
    """Reads one file. Every method raises JobFileError."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = environment

    def document(self) -> yaml.Node:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise JobFileError(f"{self._path}: {error.strerror}; check the path") from error
        if len(data) > MAX_FILE_BYTES:
            raise JobFileError(f"{self._path}: it has more than {MAX_FILE_BYTES} bytes")
        try:
            text = data.decode()
            self._check_events(text)
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise JobFileError(f"{self._path}: it is no UTF-8; save it as that") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            says = error.problem or error.context or "it can't be read"
            raise JobFileError(f"{self._path}{line}: no YAML: {says}") from error
        except yaml.YAMLError as error:
            raise JobFileError(f"{self._path}: no YAML: {error}") from error
        if node is None:
            raise JobFileError(f"{self._path}: it is empty; `sublet init` writes one")
        return node

    def _check_events(self, text: str) -> None:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise JobFileError(
                    f"{self._path}:{line}: anchors and aliases aren't read; write it out"
                )
            if tag := getattr(event, "tag", None):
                raise JobFileError(f"{self._path}:{line}: tags aren't read; leave {tag} out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise JobFileError(f"{self._path}:{line}: it is nested too deep")

    def mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return key -> (its node, the value's)."""
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what}: write it as `name: value` lines")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(key, f"{what}: a name is expected here")
            if key.value in found:
                raise self.error(key, f"{key.value}: it stands here twice; take one out")
            found[key.value] = (key, value)
        return found

    def check_names(self, entries: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> None:
        for name, (key, _) in entries.items():
            if name not in OPTIONS:
                near = get_close_matches(name.replace("-", "_"), OPTIONS, 1)
                hint = f"; did you mean {near[0]}?" if near else "; see: sublet run --help"
                raise self.error(key, f"a job has no option {name!r}{hint}")

    def value(self, option: Option, node: yaml.Node) -> object:
        kinds = _kinds(option.type)
        if isinstance(node, yaml.MappingNode) and Mapping in kinds:
            entries = self.mapping(node, option.name)
            return {self._text(k, option): self._text(v, option) for k, v in entries.values()}
        if isinstance(node, yaml.SequenceNode) and Sequence in kinds:
            return [self._text(item, option) for item in node.value]
        if not isinstance(node, yaml.ScalarNode) or kinds == {Mapping, type(None)}:
            raise self.error(node, f"{option.name}: {_expected(kinds)} is expected here")
        text = self._text(node, option)
        if bool in kinds:
            if text.lower() not in ("true", "false"):
                raise self.error(node, f"{option.name}: true or false is expected here")
            return text.lower() == "true"
        return text

    def _text(self, node: yaml.Node, option: Option) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"{option.name}: a plain value is expected here")
        if node.style is None and node.value in ("", "~", "null"):
            raise self.error(node, f"{option.name}: it has no value; leave it out, or write ''")
        return _VARIABLE.sub(lambda found: self._variable(found, node), node.value)

    def _variable(self, found: re.Match[str], node: yaml.Node) -> str:
        if found.group() == "$$":
            return "$"
        name, _, default = found.groups()
        if name is None:
            raise self.error(node, "'${' is never closed, or names no variable; write $$ for a $")
        value = self._environment.get(name) or default
        if value is None:
            raise self.error(node, f"{name} is not set here; set it, or write ${{{name}:-default}}")
        return value

    def error(self, node: yaml.Node, says: str) -> JobFileError:
        return JobFileError(f"{self._path}:{node.start_mark.line + 1}: {says}")


def _kinds(kind: Any) -> set[Any]:
    """Return what a value of an option may be: Mapping[str, str] | None is {Mapping, NoneType}."""
    if get_origin(kind) in (Union, UnionType):
        return {found for part in get_args(kind) for found in _kinds(part)}
    return {get_origin(kind) or kind}


def _expected(kinds: set[Any]) -> str:
    if Mapping in kinds:
        return "`name: value` lines"
    return "a value, or a list" if Sequence in kinds else "a plain value"


def _from_its_folder(options: dict[str, object], folder: Path) -> dict[str, object]:
    """Paths of this machine are meant from where the file lies."""
    found = dict(options)
    if "code" in options:
        found["code"] = str(folder / Path(str(options["code"])).expanduser())
    if isinstance(inputs := options.get("inputs"), Mapping):
        found["inputs"] = {
            str(folder / Path(source).expanduser()): destination
            for source, destination in inputs.items()
        }
    return found


def schema() -> dict[str, object]:
    """Return the JSON schema of such a file, for editors and other tools."""
    properties: dict[str, object] = {
        name: {**_schema_of(option), "description": option.help} for name, option in OPTIONS.items()
    }
    one_job = {"type": "object", "additionalProperties": False, "properties": properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE_NAME,
        **one_job,
        "properties": {
            **properties,
            PROFILES: {
                "description": "what is different in each profile",
                "type": "object",
                "additionalProperties": one_job,
            },
        },
    }


def _schema_of(option: Option) -> dict[str, object]:
    kinds = _kinds(option.type)
    plain: dict[str, object] = {"type": ["string", "number"]}
    if Mapping in kinds:
        return {"type": "object", "additionalProperties": plain}
    if Sequence in kinds:
        return {"anyOf": [plain, {"type": "array", "items": plain}]}
    if bool in kinds:
        # As text where it comes from the environment.
        return {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": r"\$\{"}]}
    return plain
