"""What a job can be asked for: the one list, from which everything else is made.

An entry says an option's type, default, meaning and unit, the fields of the document that it
decides, and how the command line spells it. From here come the arguments and the help of
`sublet.run`, `Client.run`, `sublet.aio` and `sublet.finetune`, the options of `sublet run` and
`sublet finetune`, the conversion into the signed document, the option that an error names, and the
table in sdk/README.md. `OPTIONS` is the same list to iterate over: names, types, defaults, help.

To add an option: an entry in JobOptions, and the field in the document that it decides. The tests
in tests/sdk/test_options.py name whatever else is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NotRequired,
    Required,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from sublet.commands import parse_command
from sublet.units import (
    AUTO,
    UnitError,
    cores_to_millis,
    credits_to_ucr,
    duration_ms,
    interval_ms,
    size_bytes,
)
from sublet_contracts.image_references import ReferenceRefused, is_image_id, parse_reference

Amount = str | int | float | Decimal
"""Credits or cores: a number, or one as text."""
Duration = str | int | float
"""'90s', '2m', '1.5h', '7d'; a number is seconds."""
Size = str | int
"""'24GB', '512MiB'; a number is bytes."""

Group = Literal["what runs", "terms", "machine", "content", "course"]


@dataclass(frozen=True)
class Option:
    """One thing that a job can be asked for."""

    help: str
    """What it is, in a line."""
    group: Group
    """The heading below which help and docs show it."""
    default: Any = None
    default_help: str = ""
    """What the default means, where its value doesn't say so."""
    fields: tuple[str, ...] = ()
    """Fields of the job document, or of its `resources`, that it decides."""
    convert: Callable[[Any, str], object] | None = None
    """From (what was written, the option's name) to the value of its only field. Raises UnitError.
    None: JobSpec makes its fields, which need more than this one value."""
    flag: str = ""
    """On the command line; by default --name. '' if it's positional there."""
    short_flag: str = ""
    metavar: str = ""

    # These follow from where the entry stands.
    name: str = ""
    type: Any = None
    required: bool = False
    positional: bool = False

    @property
    def default_text(self) -> str:
        """The default for people; '' where it's simply absent, or where there is none."""
        if self.required or self.default_help:
            return self.default_help
        if self.type is bool:
            return ""  # it's the opposite of what the option is there for
        return "" if self.default in ("", None, False) else str(self.default)


def _as_written(value: object, name: str) -> object:
    return value


def _image(value: object, name: str) -> object:
    text = str(value)
    if not is_image_id(text):
        try:
            parse_reference(text)
        except ReferenceRefused as error:
            raise UnitError(f"{name}: {error}") from error
    return text


def _folders(value: str | Sequence[str], name: str) -> object:
    """Return folders as the document says them: './ckpts/' is ckpts."""
    given = (value,) if isinstance(value, str) else tuple(value)
    return tuple(map(_plain, given))


def _plain(path: str) -> str:
    root = "/" if path.startswith("/") else ""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return root + "/".join(parts) or "."


def _cores_or_share(value: Amount, name: str) -> object:
    return 0 if value == "" else cores_to_millis(value, name)


def _size_or_none(value: Size, name: str) -> object:
    return 0 if value == "" else size_bytes(value, name)


def _as_dict(value: Mapping[str, str] | None, name: str) -> object:
    return dict(value or {})


class Program(TypedDict):
    """What runs."""

    image: Annotated[
        str,
        Option(
            "the container image; by digest (name@sha256:...) where broker or provider want it",
            "what runs",
            fields=("image",),
            convert=_image,
            metavar="IMAGE",
        ),
    ]
    command: NotRequired[
        Annotated[
            str | Sequence[str],
            Option(
                "what runs in it; one string is split into words, and no shell reads it",
                "what runs",
                default=(),
                default_help="the image's own",
                fields=("command",),
                convert=parse_command,
                metavar="COMMAND",
            ),
        ]
    ]


class JobOptions(TypedDict, total=False):
    """What a job can be asked for, besides the program."""

    max_price: Required[
        Annotated[
            Amount,
            Option(
                "the most that one device may cost, in credits per hour",
                "terms",
                fields=("max_price_ucr_per_device_hour",),
                convert=credits_to_ucr,
                metavar="CREDITS",
            ),
        ]
    ]
    budget: Required[
        Annotated[
            Amount,
            Option(
                "the most that the job may cost in all, in credits; at its edge it's paused",
                "terms",
                fields=("budget_ucr",),
                convert=credits_to_ucr,
                metavar="CREDITS",
            ),
        ]
    ]
    accept_receipts: Annotated[
        Amount | None,
        Option(
            "receipts up to this many credits stand without your signature",
            "terms",
            default_help="the budget",
            fields=("accept_receipts_up_to_ucr",),
            metavar="CREDITS",
        ),
    ]
    gpus: Annotated[
        str | int,
        Option(
            "2 (any), A100 (words of the name), A100:2 or 2xA100, 1xH100-80GB, 2x24GB, or cpu",
            "machine",
            default=1,
            fields=("devices", "device_kind", "device_memory_bytes", "device_name"),
            metavar="N",
        ),
    ]
    memory: Annotated[
        Size,
        Option(
            "main memory, in all",
            "machine",
            default="",
            default_help="8GB beside a GPU, 1GB on a CPU",
            fields=("memory_bytes",),
            metavar="SIZE",
        ),
    ]
    disk: Annotated[
        Size,
        Option(
            "disk for checkpoints and outputs, in all",
            "machine",
            default="10GB",
            fields=("disk_bytes",),
            convert=size_bytes,
            metavar="SIZE",
        ),
    ]
    cpus: Annotated[
        Amount,
        Option(
            "cores, in all",
            "machine",
            default="",
            default_help="the machine's share for its devices; once something is durable, at least "
            "as many as it was made with",
            fields=("cpu_millis",),
            convert=_cores_or_share,
            metavar="N",
        ),
    ]
    region: Annotated[
        str,
        Option(
            "only machines in exactly this region",
            "machine",
            default="",
            default_help="any",
            fields=("region",),
            convert=_as_written,
            metavar="R",
        ),
    ]
    hardware_class: Annotated[
        str,
        Option(
            "only devices of exactly this class: they give the same bits",
            "machine",
            default="",
            default_help="any",
            fields=("hardware_class",),
            convert=_as_written,
            metavar="CLASS",
        ),
    ]
    egress: Annotated[
        bool,
        Option(
            "it needs the network; without this it has none",
            "machine",
            default=False,
            fields=("egress",),
            convert=_as_written,
        ),
    ]
    user: Annotated[
        str,
        Option(
            "as whom it runs: UID, UID:GID or a name of the image's, never root; where the owner "
            "allows it",
            "machine",
            default="",
            default_help="a user of no rights",
            fields=("user",),
            convert=_as_written,
            metavar="USER",
        ),
    ]
    shm_size: Annotated[
        Size,
        Option(
            "the most in /dev/shm, which is a part of the memory",
            "machine",
            default="",
            default_help="half of the memory, 8GiB at most",
            fields=("shm_bytes",),
            convert=_size_or_none,
            metavar="SIZE",
        ),
    ]
    workdir: Annotated[
        str,
        Option(
            "the folder in the container that it begins in",
            "content",
            default="",
            default_help="the image's own, or /work",
            fields=("workdir",),
            convert=_as_written,
            metavar="DIR",
        ),
    ]
    code: Annotated[
        str,
        Option(
            "folder of code to send: the command begins in a copy of it. What .gitignore, "
            ".dockerignore and .subletignore leave out stays home, as do .git, virtual "
            "environments, caches and .env",
            "content",
            default="",
            default_help="none",
            metavar="DIR",
        ),
    ]
    inputs: Annotated[
        Mapping[str, str] | None,
        Option(
            "local file or folder to send, and its path in the container (read-only there)",
            "content",
            fields=("inputs",),
            flag="--input",
            metavar="SRC:DST",
        ),
    ]
    outputs: Annotated[
        str,
        Option(
            "folder in the container that is brought back by `download`",
            "content",
            default="",
            default_help="none",
            fields=("outputs",),
            convert=_as_written,
            metavar="DIR",
        ),
    ]
    checkpoint: Annotated[
        str | Sequence[str],
        Option(
            "folder in which the command keeps what it resumes from: saved while it runs, put back "
            "before it goes on; '.' is its working folder; several",
            "content",
            default=(),
            default_help="none",
            fields=("checkpoints",),
            convert=_folders,
            metavar="DIR",
        ),
    ]
    env: Annotated[
        Mapping[str, str] | None,
        Option(
            "environment variables; no secrets: the provider can read them",
            "content",
            fields=("env",),
            convert=_as_dict,
            short_flag="-e",
            metavar="K=V",
        ),
    ]
    name: Annotated[
        str,
        Option(
            "to find it by",
            "content",
            default="",
            default_help="from the image",
            fields=("name",),
            metavar="NAME",
        ),
    ]
    checkpoint_every: Annotated[
        Duration,
        Option(
            "how often a checkpoint is asked for; auto: by what saving costs it and how often "
            "machines are lost",
            "course",
            default=AUTO,
            fields=("checkpoint_interval_ms",),
            convert=interval_ms,
            metavar="T",
        ),
    ]
    patience: Annotated[
        Duration,
        Option(
            "how long a silent machine is waited for before the job goes on elsewhere",
            "course",
            default="20s",
            fields=("patience_ms",),
            convert=duration_ms,
            metavar="T",
        ),
    ]
    stop_grace: Annotated[
        Duration,
        Option(
            "what the job gets to save itself when it's asked to stop",
            "course",
            default="30s",
            fields=("stop_grace_ms",),
            convert=duration_ms,
            metavar="T",
        ),
    ]
    stall: Annotated[
        Duration,
        Option(
            "without a sign of life for so long it's checkpointed and paused; at least 1m",
            "course",
            default=0,
            default_help="never",
            fields=("stall_ms",),
            convert=duration_ms,
            metavar="T",
        ),
    ]
    start_within: Annotated[
        Duration,
        Option(
            "how long it may wait for a start",
            "course",
            default="7d",
            fields=("expires_ms",),
            metavar="T",
        ),
    ]
    wait_for_offer: Annotated[
        bool,
        Option(
            "queue it where no machine is free for it now; otherwise it's refused then",
            "course",
            default=True,
            flag="--no-wait",
        ),
    ]


class JobDescription(Program, JobOptions):
    """Everything that says what a job is, as `sublet.run` takes it and a file could hold it."""


def _collected() -> Mapping[str, Option]:
    found: dict[str, Option] = {}
    for name, hint in get_type_hints(JobDescription, include_extras=True).items():
        while get_origin(hint) in (Required, NotRequired):
            (hint,) = get_args(hint)
        kind, option = get_args(hint)
        positional = name in Program.__annotations__
        found[name] = replace(
            option,
            name=name,
            type=kind,
            required=name in JobDescription.__required_keys__,
            positional=positional,
            flag="" if positional else option.flag or "--" + name.replace("_", "-"),
        )
    return MappingProxyType(found)


OPTIONS: Final = _collected()
"""Every option by its name, in the order in which people are told of them."""


def completed(given: Mapping[str, object]) -> JobDescription:
    """Return a description with every default filled in. Raises TypeError, which names the option,
    if one is missing or unknown."""
    for name in given:
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"a job has no option {name!r}{hint}")
    missing = [name for name, option in OPTIONS.items() if option.required and name not in given]
    if missing:
        raise TypeError(f"a job needs {', '.join(missing)}")
    defaults = {name: option.default for name, option in OPTIONS.items()}
    return cast(JobDescription, {**defaults, **given})


def option_of_field(document_field: str) -> Option | None:
    """Return the option that decides a field of the job document, if one does."""
    return next((o for o in OPTIONS.values() if document_field in o.fields), None)
