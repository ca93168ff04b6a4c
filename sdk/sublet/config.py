"""Where a renter's key and the brokers it trusts are kept: the XDG configuration folder.

<config>/sublet/profiles/<profile>/key           the party's key (0600), made on first use
<config>/sublet/profiles/<profile>/brokers.json  URL -> the broker's id, pinned on first use
<config>/sublet/profiles/<profile>/heads.json    the broker's id -> the newest head seen of its log
"""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey

DEFAULT_BROKER = "http://127.0.0.1:8470"


class ConfigError(RuntimeError):
    """The configuration can't be used; the message says what to do."""


def config_root() -> Path:
    """Return <config>/sublet, by XDG_CONFIG_HOME or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "sublet"


@dataclass(frozen=True)
class Profile:
    """One identity of this user."""

    name: str
    folder: Path

    @classmethod
    def open(cls, name: str | None = None, config_dir: Path | None = None) -> "Profile":
        """Return a profile: the named one, SUBLET_PROFILE's, or `default`. Raises ConfigError."""
        chosen = name or os.environ.get("SUBLET_PROFILE") or "default"
        if not chosen.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"profile {chosen!r}: letters, digits, - and _ only")
        return cls(chosen, (config_dir or config_root()) / "profiles" / chosen)

    def key(self) -> SigningKey:
        """Return the party's key, made on first use. Raises KeyRefused."""
        return SigningKey.load_or_create(self.folder / "key")

    def pinned(self, url: str) -> str | None:
        """Return the broker id that was seen first at `url`."""
        return self._pinned_brokers().get(url)

    def pin(self, url: str, broker: str) -> None:
        """Keep the broker's id. Raises ConfigError if `url` had another one before."""
        brokers = self._pinned_brokers()
        known = brokers.get(url)
        if known == broker:
            return
        if known is not None:
            raise ConfigError(
                f"the broker at {url} is {broker[:18]}, and used to be {known[:18]}. If that is "
                f"meant to be, remove its line from {self._brokers_file} and try again"
            )
        self._write(self._brokers_file, {**brokers, url: broker})

    def pins(self) -> dict[str, str]:
        """Return every pinned broker: URL -> id. Raises ConfigError."""
        return self._pinned_brokers()

    def seen_head(self, broker: str) -> Envelope | None:
        """Return the newest head of that broker's log that was seen. Raises ConfigError."""
        value = self._read(self._heads_file).get(broker)
        try:
            return Envelope.model_validate_json(json.dumps(value)) if value else None
        except ValidationError as error:
            raise ConfigError(f"{self._heads_file}: not a log's head; remove that file") from error

    def keep_head(self, broker: str, head: Envelope) -> None:
        """Keep a head of that broker's log."""
        self._write(
            self._heads_file, {**self._read(self._heads_file), broker: head.model_dump(mode="json")}
        )

    def keep_evidence(self, name: str, documents: Sequence[Envelope]) -> Path:
        """Write documents that prove something against somebody; return the file."""
        path = self.folder / f"evidence-{name}.json"
        self._write(path, [document.model_dump(mode="json") for document in documents])
        return path

    @property
    def _brokers_file(self) -> Path:
        return self.folder / "brokers.json"

    @property
    def _heads_file(self) -> Path:
        return self.folder / "heads.json"

    def _pinned_brokers(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._read(self._brokers_file).items()}

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            value = json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON; remove it") from error
        return value if isinstance(value, dict) else {}

    def _write(self, file: Path, value: object) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        aside.write_text(json.dumps(value, indent=2) + "\n")
        aside.replace(file)


def broker_url(url: str | None = None) -> str:
    """Return the broker's URL: as given, SUBLET_BROKER's, or this machine's. Raises ConfigError."""
    chosen = (url or os.environ.get("SUBLET_BROKER") or DEFAULT_BROKER).rstrip("/")
    if not chosen.startswith(("http://", "https://")):
        raise ConfigError(f"broker {chosen!r} must start with http:// or https://")
    return chosen
