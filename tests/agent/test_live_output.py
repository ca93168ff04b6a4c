"""What a job is writing is seen before a line of it ends, and what is kept of it is whole: on both
runners."""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.docker.usage import measure_of
from sublet_agent.core.runner_port import Measure
from tests.agent.runner_world import Kind, World, wait_for
from tests.services import require


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    kind: Kind = request.param
    if kind == "docker":
        require("docker")
    made = World(kind, tmp_path)
    yield made
    made.close()


def states(world: World, run_id: str) -> dict[str, str]:
    return {line.stream: line.text for line in world.runner.unfinished_lines(run_id)}


GATED = """
import os, sys, time
def gate(name):
    while not os.path.exists(os.environ["SUBLET_CHECKPOINT_DIR"] + "/ack/" + name): time.sleep(0.01)
"""


def opened(world: World, run_id: str, name: str) -> None:
    (world.root / run_id / "checkpoint" / "ack" / name).touch()


def test_a_bar_without_a_line_feed_is_seen_and_is_one_line_in_the_end(world: World) -> None:
    code = GATED + textwrap.dedent("""
        for i in range(41):
            sys.stderr.write('\\r épo: %3d%%|███▌  | %d/60 ✓' % (i * 100 // 60, i))
            sys.stderr.flush()
        print('Übung?', end='', flush=True)
        gate('one')
        print(' ja')
        for i in range(41, 61):
            sys.stderr.write('\\r épo: %3d%%|██████| %d/60 ✓' % (i * 100 // 60, i))
        sys.stderr.write('\\n'); sys.stderr.flush()
        gate('two')
        print("kein Zeilenende 🚀", end='')
    """)
    spec = world.spec(code)
    world.runner.start(spec)
    wait_for(
        lambda: (
            states(world, spec.run_id)
            == {"stdout": "Übung?", "stderr": " épo:  66%|███▌  | 40/60 ✓"}
        ),
        "the two lines that are being written",
    )
    assert world.lines(spec.run_id) == []
    opened(world, spec.run_id, "one")
    wait_for(lambda: len(world.lines(spec.run_id)) == 2, "the two lines")
    wait_for(lambda: not states(world, spec.run_id), "their place to be empty")
    opened(world, spec.run_id, "two")
    world.ended(spec.run_id)
    found = {(line.stream, line.text) for line in world.lines(spec.run_id)}
    assert found == {
        ("stdout", "Übung? ja"),
        ("stderr", " épo: 100%|██████| 60/60 ✓"),
        ("stdout", "kein Zeilenende 🚀"),
    }
    assert states(world, spec.run_id) == {} or world.kind == "process"


def test_no_character_is_cut_whatever_the_pieces(world: World) -> None:
    text = "x" + "é" * 20_000 + "🚀训练" * 6_000
    code = textwrap.dedent("""
        import os
        data = ("x" + "é" * 20_000 + "🚀训练" * 6_000 + "\\n").encode()
        at = 0
        for n, size in enumerate((1, 3, 5, 4093, 16383, 16385, 65536, 7)):
            os.write(1, data[at:at + size]); at += size
        while at < len(data): at += os.write(1, data[at:at + 30_001])
        for i in range(3000): os.write(2, "\\r训练 {:4d} ▌".format(i).encode())
    """)
    spec, _ = world.run(code)
    lines = world.lines(spec.run_id)
    assert "".join(line.text for line in lines if line.stream == "stdout") == text
    assert [line.text for line in lines if line.stream == "stderr"] == ["训练 2999 ▌"]


def test_a_cursor_in_the_middle_of_a_line_goes_on_there(world: World) -> None:
    """An agent that is started anew between any two reads keeps what it had read of a line."""
    code = textwrap.dedent("""
        import os
        for i in range(2000): os.write(1, "\\r{:5d} {}".format(i, "é" * 30).encode())
        os.write(1, b"\\nend\\n" + b"z" * 16384 + b"\\n\\n" + b"z" * 32768)
    """)
    spec, _ = world.run(code)
    cursor, texts = None, []
    more = True
    while more:
        batch = world.restarted().read_logs(spec.run_id, cursor, 1, ended=True)
        texts += [line.text for line in batch.lines]
        cursor, more = batch.cursor, batch.more
    assert texts == [" 1999 " + "é" * 30, "end", "z" * 16384, "", "z" * 16384, "z" * 16384]


def test_what_a_run_uses_is_measured(world: World) -> None:
    code = GATED + "held = b'x' * 100_000_000\nprint('held', flush=True)\ngate('one')\n"
    code += "t = time.process_time()\nwhile time.process_time() - t < 0.3: pass\n"
    code += "print('spun', flush=True)\ngate('two')\n"
    spec = world.spec(code)
    world.runner.start(spec)
    world.shown(spec.run_id, "held")

    def measured(fits: Callable[[Measure], bool]) -> Measure:
        found: list[Measure] = []

        def fit() -> bool:
            measure = world.runner.measure(spec.run_id)
            found[:] = [measure] if measure is not None else []
            return measure is not None and fits(measure)

        wait_for(fit, "a measure that fits")
        return found[0]

    first = measured(lambda m: (m.memory_bytes or 0) >= 100_000_000)
    assert (first.memory_bytes or 0) < 200_000_000
    opened(world, spec.run_id, "one")
    world.shown(spec.run_id, "spun")
    measured(lambda m: (m.cpu_ns or 0) >= (first.cpu_ns or 0) + 250_000_000)
    opened(world, spec.run_id, "two")
    world.ended(spec.run_id)
    over = world.runner.measure(spec.run_id)
    assert (over is None) == (world.kind == "docker")
    if over is not None:
        assert (over.peak_memory_bytes or 0) >= 100_000_000


def test_the_engines_counters_of_either_kind_of_cgroup() -> None:
    v1 = {"memory_stats": {"usage": 900, "stats": {"total_inactive_file": 100, "inactive_file": 1}}}
    v2 = {"memory_stats": {"usage": 900, "stats": {"inactive_file": 300}}}
    cpu = {"cpu_stats": {"cpu_usage": {"total_usage": 5}}}
    assert measure_of(v1 | cpu, 7) == Measure(7, cpu_ns=5, memory_bytes=800)
    assert measure_of(v2 | cpu, 7) == Measure(7, cpu_ns=5, memory_bytes=600)
    odd: tuple[object, ...] = (
        {}, [], None, {"memory_stats": {}}, {"memory_stats": {"usage": "9"}},
        {"memory_stats": {"usage": -1}}, {"memory_stats": {"usage": True}}, {"memory_stats": 3},
    )  # fmt: skip
    assert [measure_of(stats, 7) for stats in odd] == [None] * len(odd)
    assert measure_of({"memory_stats": {"usage": 9}, "cpu_stats": 4}, 7) == Measure(7, None, 9)
