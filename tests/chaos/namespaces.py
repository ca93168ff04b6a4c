"""Machines of their own, as far as the network goes: namespaces, joined by a bridge.

The bridge is in a namespace of its own, too, so that no firewall of this machine (Docker's, say)
has a say in what passes.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Literal

Way = Literal["hears nothing", "is not heard"]
_numbers = itertools.count()


def missing() -> str | None:
    """Say why there can be no network namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("iptables", "iptables")):
        if shutil.which(tool) is None:
            return f"no {tool}: apt-get install {package}"
    tried = Networks(0, f"sublet-try-{os.getpid()}")
    try:
        tried.add("x")
        tried.block("x", "is not heard")
    except RuntimeError as error:
        return f"no network namespaces can be made here ({error})"
    finally:
        tried.close()
    return None


class Networks:
    """Namespaces by name, each with one address; this process has the address .254."""

    def __init__(self, net: int | None = None, prefix: str = "") -> None:
        """`net`: the number in 10.213.NET.0/24; by default this process's id chooses."""
        self.net = os.getpid() % 250 if net is None else net
        self.prefix = prefix or f"sublet-{os.getpid()}"
        self.names: list[str] = []
        # A name for each: what a namespace held goes a while after the namespace.
        self._here = f"sb{os.getpid()}-{next(_numbers)}"
        self._made: list[str] = []

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def add(self, name: str) -> None:
        """Make a namespace and join it to the others. Raises RuntimeError."""
        if not self._made:
            self._make("switch")
            self._in("switch", "ip", "link", "add", "br0", "type", "bridge")
            self._in("switch", "ip", "link", "set", "br0", "up")
            _run(
                "ip",
                "link",
                "add",
                self._here,
                "type",
                "veth",
                "peer",
                "name",
                "here",
                "netns",
                self._space("switch"),
            )
            self._in("switch", "ip", "link", "set", "here", "master", "br0", "up")
            _run("ip", "addr", "add", f"10.213.{self.net}.254/24", "dev", self._here)
            _run("ip", "link", "set", self._here, "up")
        self._make(name)
        self.names.append(name)
        port = f"port{len(self.names)}"
        self._in(
            "switch",
            "ip",
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self._space(name),
        )
        self._in("switch", "ip", "link", "set", port, "master", "br0", "up")
        self._in(name, "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._in(name, "ip", "link", "set", "eth0", "up")

    def address(self, name: str) -> str:
        """Return its IPv4 address."""
        return f"10.213.{self.net}.{self.names.index(name) + 1}"

    def within(self, name: str) -> Sequence[str]:
        """Return the command that runs another one in a namespace and becomes it."""
        return ("ip", "netns", "exec", self._space(name))

    def cut(self, name: str) -> None:
        """Take its cable out."""
        self._in("switch", "ip", "link", "set", self._port(name), "down")

    def heal(self, name: str) -> None:
        """Put its cable in again."""
        self._in("switch", "ip", "link", "set", self._port(name), "up")

    def block(self, name: str, way: Way) -> None:
        """Let nothing pass in one direction; nobody is told."""
        self._in(name, "iptables", "-I", *_rule(way))

    def unblock(self, name: str, way: Way) -> None:
        """Let it pass again."""
        self._in(name, "iptables", "-D", *_rule(way))

    def close(self) -> None:
        """Take all of it down."""
        for space in reversed(self._made):
            _run("ip", "netns", "del", space)
        self._made.clear()

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name) + 1}"

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", self._space(name))
        self._made.append(self._space(name))
        self._in(name, "ip", "link", "set", "lo", "up")

    def _in(self, name: str, *command: str) -> None:
        _run(*self.within(name), *command)


def _rule(way: Way) -> tuple[str, ...]:
    if way == "hears nothing":
        return ("INPUT", "-i", "eth0", "-j", "DROP")
    return ("OUTPUT", "-o", "eth0", "-j", "DROP")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
