"""The options of a job as people read them: `help(sublet.run)`, and the table in sdk/README.md.

`python -m sublet.options_docs sdk/README.md` writes the table anew; a test finds it stale.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from sublet.options import OPTIONS, Option

F = TypeVar("F", bound=Callable[..., object])

BEGIN = "<!-- Generated: python -m sublet.options_docs sdk/README.md -->"
END = "<!-- End of what is generated. -->"


def with_options(preset: Mapping[str, object] = MappingProxyType({})) -> Callable[[F], F]:
    """Give a `function(..., **options: Unpack[JobOptions])` the signature and the docstring that
    name each option, for `help` and for tools that look at run time; editors read the annotation.

    `preset`: the function's own defaults for some of them."""

    def documented(function: F) -> F:
        named: Any = function
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [preset_option(o, preset) for o in OPTIONS.values() if not o.positional]
        listed = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        listed += [_parameter(option) for option in options]
        listed += [p for p in own if p.kind is p.KEYWORD_ONLY]
        named.__signature__ = signature.replace(parameters=listed)
        if function.__doc__ is not None:  # None under python -OO
            text = "\n".join(["Options:", *map(_line, options)])
            named.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{text}\n"
        return function

    return documented


def preset_option(option: Option, preset: Mapping[str, object]) -> Option:
    """Return the option with its default in `preset`, if it has one there."""
    if option.name not in preset:
        return option
    return replace(option, default=preset[option.name], default_help="")


def _parameter(option: Option) -> inspect.Parameter:
    default = inspect.Parameter.empty if option.required else option.default
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, keyword_only, default=default, annotation=option.type)


def _line(option: Option) -> str:
    width = 6 + max(map(len, OPTIONS))
    head = f"    {option.name}".ljust(width)
    return textwrap.fill(meaning(option), 96, initial_indent=head, subsequent_indent=" " * width)


def meaning(option: Option) -> str:
    """Return what an option is, with its default."""
    if option.required and not option.positional:
        return f"{option.help} (required)"
    return option.help + (f" (default: {option.default_text})" if option.default_text else "")


def table() -> Iterator[str]:
    """Yield the lines of the table of options, in Markdown."""
    yield "| option | `sublet run` | type | default | what it is |"
    yield "| --- | --- | --- | --- | --- |"
    for option in OPTIONS.values():
        default = "required" if option.required else option.default_text
        cells = (f"`{option.name}`", f"`{_on_command_line(option)}`", _type(option), default)
        yield "| " + " | ".join((*cells, option.help)) + " |"


def _on_command_line(option: Option) -> str:
    if option.positional:
        return option.metavar
    flags = f"{option.short_flag}, {option.flag}" if option.short_flag else option.flag
    return f"{flags} {option.metavar}".rstrip()


def _type(option: Option) -> str:
    text = inspect.formatannotation(option.type)
    for module in ("collections.abc.", "decimal."):
        text = text.replace(module, "")
    return "`" + text.replace("|", "\\|") + "`"


def updated(page: str) -> str:
    """Return a page with the table between its two marks made anew. Raises ValueError without."""
    before, begin, rest = page.partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise ValueError(f"the page lacks a line {BEGIN!r} or, after it, {END!r}")
    return "\n".join([before + BEGIN, *table(), END, after])


if __name__ == "__main__":
    _page = Path(sys.argv[1])
    _page.write_text(updated(_page.read_text(encoding="utf-8")), encoding="utf-8")
