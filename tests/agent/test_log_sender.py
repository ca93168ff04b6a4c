"""How unfinished lines are told to the broker: what has changed, now and then, and never as they
stood before their end."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from sublet_agent.adapters.session import log_sender
from sublet_agent.adapters.session.disk_reserve import Reserve
from sublet_agent.adapters.session.log_sender import REPEAT_S, STATES_S, LogSender
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.core.runner_port import OutputLine
from sublet_contracts.run_conventions import MAX_LOG_STATE_CHARACTERS
from sublet_contracts.wire import LogStates

LEASE = "a" * 64
NOW_MS = 1_800_000_000_000


class World:
    """A sender on a real spool, with a link that keeps what it is given."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(
            log_sender, "time", SimpleNamespace(monotonic=lambda: self.now_s), raising=True
        )
        self.sent: list[LogStates] = []
        self.link = SimpleNamespace(live=True, send=self._send)
        run = SimpleNamespace(record=SimpleNamespace(lease=SimpleNamespace(epoch=3)))
        core = SimpleNamespace(runs={LEASE: run})
        self.spool = Spool(root / "spool.db", Reserve(root / "reserve"))
        self.sender = LogSender(self.spool, cast(Any, core), lambda: cast(Any, self.link))

    def _send(self, message: LogStates) -> bool:
        self.sent.append(message)
        return True

    def stands(self, *lines: OutputLine, after_s: float = STATES_S) -> list[str]:
        """Some time later the lines stand so; return what is told of it, None told: nothing."""
        self.now_s += after_s
        before = len(self.sent)
        self.sender.unfinished(LEASE, lines)
        return [state.text for message in self.sent[before:] for state in message.states]


def line(
    text: str, at_ms: int, stream: Literal["stdout", "stderr", "sublet"] = "stderr"
) -> OutputLine:
    return OutputLine(stream, NOW_MS + at_ms, text)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.spool.close()


def test_changes_are_told_now_and_then_and_all_of_it_once_in_a_while(world: World) -> None:
    assert world.stands() == []
    assert world.sent == []
    assert world.stands(line("10%", 1)) == ["10%"]
    assert (world.sent[0].epoch, world.sent[0].states[0].number) == (3, 0)
    assert world.stands(line("11%", 2), after_s=STATES_S / 2) == []
    assert world.stands(line("12%", 3), after_s=STATES_S / 2) == ["12%"]
    assert world.stands(line("12%", 4)) == []
    assert world.stands(line("12%", 5), after_s=REPEAT_S) == ["12%"]
    world.sender.begin_session()  # the broker may be another one by now
    assert world.stands(line("12%", 6)) == ["12%"]
    assert world.stands(line("x" * 9_000, 7)) == ["x" * MAX_LOG_STATE_CHARACTERS]
    told = len(world.sent)
    world.stands()
    assert [message.states for message in world.sent[told:]] == [()]  # wiped away
    world.stands()
    assert len(world.sent) == told + 1


def test_what_was_seen_before_the_line_was_finished_is_not_told_after_it(world: World) -> None:
    assert world.stands(line("97%", 10)) == ["97%"]
    world.spool.add(LEASE, [line("100%", 40), line("step 7", 50, "stdout")], None)
    told = len(world.sent)
    assert world.stands(line("97%", 30)) == []  # the runner's file is a little behind
    assert [message.states for message in world.sent[told:]] == [()]
    assert world.stands(line("0%", 90)) == ["0%"]
    assert world.sent[-1].states[0].number == 2


def test_without_a_session_nothing_is_told_and_nothing_is_taken_for_told(world: World) -> None:
    world.link.live = False
    assert world.stands(line("10%", 1)) == []
    world.link.live = True
    assert world.stands(line("10%", 1)) == ["10%"]
