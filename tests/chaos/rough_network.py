"""A rough network: all that agents and renter say to the broker goes through delaying, cutting,
swallowing proxies.

First each fault by itself, for certain: connections that are reset in mid-stream, half-open ones
in either direction, a port where nobody listens; then all of them at random until the jobs have
ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sublet.client import Client
from tests.chaos.churn import Say
from tests.chaos.proxy import CALM, Direction, Proxy, Weather
from tests.chaos.stage import Stage, Work

ROUGH = Weather(delay_s=0.02, jitter_s=0.08, fragments=True, bytes_per_s=2e6)
STORM = Weather(
    delay_s=0.02,
    jitter_s=0.2,
    fragments=True,
    bytes_per_s=5e5,
    reset_share=0.02,
    dead_share=0.002,
    refused_share=0.05,
)
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
RESETTING = Weather(jitter_s=0.05, fragments=True, reset_share=0.2)
RESETS = 10
"""Connections that are reset in the midst of a chunk, at agents and at renters, in that phase."""
AWAY_LIMIT_S = 300.0


class RoughNetwork(Stage):
    """One run."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        jobs: int = 8,
        work: Work = Work(600),  # noqa: B008
        patience: str = "60s",
        agents: int = 3,
        directions: Sequence[Direction] = DIRECTIONS,
    ) -> None:
        super().__init__(root, seed, say, work=work, patience=patience, agents=agents)
        self.directions = directions
        self.count = jobs
        self.proxies: list[Proxy] = []

    def start(self) -> None:
        """Start the broker, and the proxies through which everybody else reaches it."""
        super().start()
        host, port = self.listens.split(":")
        self.proxies = [Proxy((host, int(port)), self.facts.seed + n) for n in range(2)]
        self.agents, self.renters = self.proxies
        self.market.url = self.agents.url
        self.client.close()
        self.client = Client(
            broker=self.renters.url, config_dir=self.root / "config", away_limit_s=AWAY_LIMIT_S
        )

    def storm(self) -> None:
        """See Stage."""
        self._weather(ROUGH)
        for number in range(self.count):
            self.train(f"job-{number}")
        self.until_durable(self.jobs[: len(self.names)])
        self._reset()
        for way in self.directions:
            self._half_open(way)
        self._shut()
        self.say("  all of it at random, until the jobs have ended")
        self._weather(STORM)
        self.all_ended()
        self._weather(CALM)
        for proxy in self.proxies:
            proxy.reset()  # What is half-open stays so otherwise.
            for what, times in proxy.counts.items():
                self.hit(what, times)

    def _weather(self, weather: Weather) -> None:
        for proxy in self.proxies:
            proxy.weather = weather

    def _reset(self) -> None:
        self.say("  resets in mid-stream")
        self._weather(RESETTING)

        def enough() -> bool:
            self.client.jobs()
            return all(proxy.counts["resets"] >= RESETS for proxy in self.proxies)

        self.soon(enough, f"{RESETS} resets", 180)
        self._weather(CALM)
        self.goes_on()

    def _half_open(self, way: Direction) -> None:
        self.say(f"  half-open connections, {way}")
        self.need(self.agents.deaden(way) >= len(self.names), "not all agents were connected")
        self.goes_on()

    def _shut(self) -> None:
        self.say("  nobody listens")
        self.agents.shut()
        self.hit("ports shut")
        self.connected(0)
        self.agents.open()
        self.connected(len(self.names))
        self.goes_on()

    def stop(self) -> None:
        """See BadMarket."""
        super().stop()
        for proxy in self.proxies:
            proxy.close()
