"""The command line of `sublet provide` and `sublet provider`, read strictly and explained."""

import argparse
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from sublet_contracts.image_references import (
    ReferenceRefused,
    is_image_id,
    is_registry,
    parse_reference,
)
from sublet_contracts.keys import PARTY_PATTERN
from sublet_contracts.rules import UCR_PER_CREDIT

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, None: 1_000}
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class UsageError(Exception):
    """The command can't be carried out as asked; the text names the option and what to do."""


@dataclass(frozen=True)
class Options:
    """What the owner asked `sublet provide` for."""

    broker: str
    price_ucr: int
    runner: str
    state: Path
    devices: tuple[str, ...]
    cpu: bool
    trust: tuple[str, ...]
    region: str
    name: str
    grace_ms: int
    image_policy: str
    allow_images: tuple[str, ...]
    allow_registries: tuple[str, ...]
    image_cap_bytes: int
    pull_patience_ms: int
    allow_egress: bool
    allow_user: bool
    renter_caches_bytes: int
    cache_bytes: int | None
    """None: a share of the disk"""
    memory_bytes: int
    disk_bytes: int
    json: bool


def default_state() -> Path:
    """Return the agent's state folder unless told otherwise."""
    return Path(platformdirs.user_state_dir("sublet")) / "provider"


def read_options(argv: Sequence[str]) -> Options:
    """Read the arguments of `sublet provide`. Exits with 2 on a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="sublet provide",
        description="Put this machine's GPUs on the market. Runs until it is stopped; SIGTERM or "
        "Ctrl-C drains: jobs are checkpointed and go on elsewhere.",
    )
    add = parser.add_argument
    add(
        "--broker",
        default=os.environ.get("SUBLET_BROKER") or None,
        metavar="URL",
        help="the broker, e.g. https://broker.example (default: $SUBLET_BROKER)",
    )
    add(
        "--price",
        type=_price,
        default="0.40",
        metavar="CREDITS",
        help="credits per device-hour (default: 0.40)",
    )
    add(
        "--runner",
        choices=["auto", "docker", "process"],
        default="auto",
        help="auto: docker where an engine answers, else process (no isolation)",
    )
    add(
        "--state",
        type=Path,
        default=default_state(),
        metavar="DIR",
        help="key, journal and runs (default: %(default)s)",
    )
    add(
        "--devices",
        type=_devices,
        default="all",
        metavar="all|none|ID,...",
        help="which GPUs, by uuid or number (default: all)",
    )
    add("--cpu", action="store_true", help="offer the CPU as one device of kind cpu instead")
    add(
        "--trust",
        type=_party,
        action="append",
        default=[],
        metavar="PARTY",
        help="serve this renter only (may be given several times)",
    )
    add("--region", type=_label, default="local", help="a label such as eu-west (default: local)")
    add("--name", default=socket.gethostname() or "machine", help="what people call the machine")
    add(
        "--grace",
        type=_duration,
        default="60s",
        metavar="TIME",
        help="notice that a reclaim gives the job (default: 60s)",
    )
    add(
        "--image-policy",
        choices=["digest", "any"],
        default="any",
        help="digest: only images that are pinned by digest",
    )
    add(
        "--allow-image",
        type=_image,
        action="append",
        default=[],
        metavar="IMAGE",
        help="an image of this machine that renters may use as well, by name or id (may be given "
        "several times); they have all that can be pulled without a login",
    )
    add(
        "--allow-registry",
        type=_registry,
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="a registry that renters may use although its address is private (may be given "
        "several times)",
    )
    add(
        "--image-cap",
        type=_size,
        default="0",
        metavar="SIZE",
        help="the biggest image that is pulled (default: half of --disk)",
    )
    add(
        "--pull-patience",
        type=_duration,
        default="2m",
        metavar="TIME",
        help="a pull without bytes for so long is ended, and the job goes elsewhere (default: 2m)",
    )
    add("--allow-egress", action="store_true", help="jobs that ask for it may reach the network")
    add(
        "--allow-user",
        action="store_true",
        help="jobs may choose the number of the user that they run as (never root)",
    )
    add(
        "--renter-caches",
        type=_size,
        default="0",
        metavar="SIZE",
        help="keep each renter's own caches (pip, hub, Triton) between his runs here, of all of "
        "them so much at the most (default: none are kept)",
    )
    add(
        "--cache",
        type=_size,
        default=None,
        metavar="SIZE",
        help="keep what runs have fetched as inputs for the same renter's next runs, within --disk "
        "and for a week at the most; 0: keep nothing (default: a tenth of --disk)",
    )
    add("--memory", type=_size, default="0", metavar="SIZE", help="main memory offered, in all")
    add(
        "--disk",
        type=_size,
        default="0",
        metavar="SIZE",
        help="disk offered, in all: for what runs write, and for renters' images",
    )
    add("--json", action="store_true", help="one JSON object a line instead of words")
    found = parser.parse_args(argv)
    if not found.broker:
        parser.error("--broker URL is needed (or set SUBLET_BROKER)")
    if not re.match(r"https?://[^/]+", found.broker):
        parser.error(f"--broker {found.broker!r}: must start with http:// or https://")
    try:
        address = urlsplit(found.broker)
        if not address.hostname or address.port == 0:
            parser.error(f"--broker {found.broker!r}: names no host, or port 0")
    except ValueError as error:
        parser.error(f"--broker {found.broker!r}: {error}")
    return Options(
        broker=found.broker.rstrip("/"),
        price_ucr=found.price,
        runner=found.runner,
        state=found.state.expanduser().absolute(),
        devices=found.devices,
        cpu=found.cpu,
        trust=tuple(dict.fromkeys(found.trust)),
        region=found.region,
        name=found.name[:256],
        grace_ms=found.grace,
        image_policy=found.image_policy,
        allow_images=tuple(dict.fromkeys(found.allow_image)),
        allow_registries=tuple(dict.fromkeys(found.allow_registry)),
        image_cap_bytes=found.image_cap,
        pull_patience_ms=found.pull_patience,
        allow_egress=found.allow_egress,
        allow_user=found.allow_user,
        renter_caches_bytes=found.renter_caches,
        cache_bytes=found.cache,
        memory_bytes=found.memory,
        disk_bytes=found.disk,
        json=found.json,
    )


@dataclass(frozen=True)
class OwnerCommand:
    """What the owner asked `sublet provider` for."""

    command: str
    state: Path
    grace_ms: int | None
    json: bool


def read_owner_command(argv: Sequence[str]) -> OwnerCommand:
    """Read the arguments of `sublet provider`."""
    parser = argparse.ArgumentParser(
        prog="sublet provider", description="Speak with the agent that runs on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "status": "what the agent does",
        "drain": "checkpoint and hand back all runs, then stop the agent",
        "reclaim": "take the devices back now; the agent stays, offering nothing until `offer`",
        "offer": "put the devices back on the market after a reclaim",
        "forget-caches": "delete what is kept for renters' next runs (--cache, --renter-caches)",
        "earnings": "what this machine has earned, by the broker's books",
    }
    for name, text in texts.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--state", type=Path, default=default_state(), metavar="DIR")
        sub.add_argument("--json", action="store_true")
        if name in ("drain", "reclaim"):
            sub.add_argument(
                "--grace",
                type=_duration,
                default=None,
                metavar="TIME",
                help="time to checkpoint (default: as offered)",
            )
    found = parser.parse_args(argv)
    return OwnerCommand(
        found.command,
        found.state.expanduser().absolute(),
        getattr(found, "grace", None),
        found.json,
    )


def _price(text: str) -> int:
    try:
        ucr = Decimal(text) * UCR_PER_CREDIT
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.40") from None
    if not ucr.is_finite() or ucr != ucr.to_integral_value() or not 0 <= ucr <= 10**15:
        raise argparse.ArgumentTypeError(f"{text!r}: from 0, with six decimal places at most")
    return int(ucr)


def _duration(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if not match or float(match[1]) > 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s or 2m")
    return int(float(match[1]) * _UNIT_MS[match[2]])


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match or len(match[1]) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 16GB")
    # As renters write sizes: GB are powers of 1000, GiB of 1024.
    step = 1024 if match[3] else 1000
    return int(Decimal(match[1]) * step ** _POWERS[(match[2] or "").lower()])


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise argparse.ArgumentTypeError("name devices, or all, or none")
    return names


def _image(text: str) -> str:
    try:
        if not is_image_id(text):
            parse_reference(text)
    except ReferenceRefused as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _registry(text: str) -> str:
    if not is_registry(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a registry such as host:5000")
    return text.lower()


def _party(text: str) -> str:
    if not re.match(PARTY_PATTERN, text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a party id (ed25519-...)")
    return text


def _label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: small letters, digits, '.' and '-' only")
    return text
