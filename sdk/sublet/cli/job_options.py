"""A job's options as arguments of `sublet run` and `sublet finetune`, from sublet/options.py."""

import argparse
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

from sublet.cli.errors import USAGE, CommandError
from sublet.cli.parser import Parser
from sublet.options import OPTIONS, JobOptions, Option
from sublet.options_docs import meaning, preset_option


def add_job_options(
    parser: Parser,
    preset: Mapping[str, object] = MappingProxyType({}),
    *,
    or_in_a_file: bool = False,
) -> dict[str, Any]:
    """Add an argument for each option that isn't positional; return the groups that they are in.

    `preset`: the command's own defaults for some of them, for the help. `or_in_a_file`: what is
    required may stand elsewhere (`missing_option` says what doesn't).
    """
    groups: dict[str, Any] = {}
    for option in OPTIONS.values():
        if option.positional:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        required = option.required and not or_in_a_file
        _add(groups[option.group], preset_option(option, preset), required)
    return groups


def _add(group: Any, option: Option, required: bool) -> None:
    flags = [option.short_flag, option.flag] if option.short_flag else [option.flag]
    help_text = meaning(option).replace("%", "%%")
    common: dict[str, Any] = {"dest": option.name, "help": help_text, "default": None}
    if option.type is bool:
        # An option that holds by default is named by what it takes to do without.
        action = "store_false" if option.default is True else "store_true"
        group.add_argument(*flags, action=action, **common)
        if option.default is True:
            said = option.flag.replace("--no-", "--", 1)  # what holds anyway may be said as well
            quiet = {**common, "help": argparse.SUPPRESS}
            group.add_argument(said, action="store_true", **quiet)
        return
    if option.name in _PAIRS or option.name in _LISTS:
        common["action"] = "append"
    group.add_argument(*flags, required=required, metavar=option.metavar, **common)


def given_options(arguments: argparse.Namespace) -> JobOptions:
    """Return those of the added options that were given. Raises CommandError."""
    given: dict[str, object] = {}
    for name, option in OPTIONS.items():
        value = None if option.positional else getattr(arguments, name)
        if value is None:
            continue
        if name in _PAIRS:
            value = dict(_PAIRS[name](pair, option.flag) for pair in value)
        given[name] = value
    return cast(JobOptions, given)


def missing_option(given: Mapping[str, object]) -> CommandError | None:
    """Return the error that something required isn't there; None: all of it is."""
    missing = [
        option.flag or option.metavar
        for name, option in OPTIONS.items()
        if option.required and name not in given
    ]
    if not missing:
        return None
    return CommandError(
        f"{', '.join(missing)}: missing", "give it here, or in a file that -f names", USAGE
    )


def _input(pair: str, flag: str) -> tuple[str, str]:
    source, colon, destination = pair.rpartition(":")
    if not colon or not source or not destination.startswith("/"):
        raise CommandError(
            f"{flag}: {pair!r} is not SRC:DST", "write it like data.csv:/data/data.csv", USAGE
        )
    return source, destination


def _env(pair: str, flag: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if equals and name:
        return name, value
    if name in os.environ:
        return name, os.environ[name]
    raise CommandError(
        f"{flag}: {pair!r} is neither K=V nor set here", "write it like -e SEED=17", USAGE
    )


_LISTS = frozenset({"checkpoint"})
"""Options that may be given several times, a value each."""

_PAIRS: Mapping[str, Callable[[str, str], tuple[str, str]]] = {"inputs": _input, "env": _env}
"""How an option that holds pairs is written, once for each pair."""
