"""Where a renter's key and the brokers it trusts are kept: the XDG configuration folder.

<config>/sublet/profiles/<profile>/key           the party's key (0600), made on first use
<config>/sublet/profiles/<profile>/brokers.json  URL -> the broker's id, pinned on first use
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

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
        return self._brokers().get(url)

    def pin(self, url: str, broker: str) -> None:
        """Keep the broker's id. Raises ConfigError if `url` had another one before."""
        brokers = self._brokers()
        known = brokers.get(url)
        if known == broker:
            return
        if known is not None:
            raise ConfigError(
                f"the broker at {url} is {broker[:18]}, and used to be {known[:18]}. If that is "
                f"meant to be, remove its line from {self._file} and try again"
            )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = self._file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({**brokers, url: broker}, indent=2) + "\n")
        aside.replace(self._file)

    def pins(self) -> dict[str, str]:
        """Return every pinned broker: URL -> id. Raises ConfigError."""
        return self._brokers()

    @property
    def _file(self) -> Path:
        return self.folder / "brokers.json"

    def _brokers(self) -> dict[str, str]:
        try:
            value = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"{self._file} is not JSON; remove it") from error
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}


def broker_url(url: str | None = None) -> str:
    """Return the broker's URL: as given, SUBLET_BROKER's, or this machine's. Raises ConfigError."""
    chosen = (url or os.environ.get("SUBLET_BROKER") or DEFAULT_BROKER).rstrip("/")
    if not chosen.startswith(("http://", "https://")):
        raise ConfigError(f"broker {chosen!r} must start with http:// or https://")
    return chosen
