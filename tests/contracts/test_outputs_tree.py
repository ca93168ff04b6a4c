"""A folder of outputs: what can be carried is carried, and what can't costs only itself."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sublet_contracts.outputs_tree import MAX_DEPTH, left_out_lines, scan_outputs
from sublet_contracts.tree import (
    MAX_FILES,
    MAX_LEFT_OUT,
    LeftOut,
    ScannedTree,
    TreeIndex,
    TreeRefused,
    WhyLeftOut,
    parse_index,
    shown,
)

MIB = 2**20


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"w" * 100)
    return folder


def scan(outputs: Path, max_bytes: int = 500 * MIB) -> ScannedTree:
    tree = scan_outputs(outputs, max_bytes=max_bytes, inside=outputs.parent)
    assert parse_index(tree.index.to_bytes()) == tree.index
    return tree


def names(tree: ScannedTree) -> list[str]:
    return [file.path for file in tree.index.files]


def left_out(tree: ScannedTree) -> dict[str, WhyLeftOut]:
    assert tree.index.left_out_total == len(tree.index.left_out)
    return {entry.path: entry.why for entry in tree.index.left_out}


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_odd_entries_cost_only_themselves(outputs: Path) -> None:
    (outputs / "runs").mkdir()
    (outputs / "runs" / "log").write_bytes(b"l")
    (outputs / "latest").symlink_to("runs")
    (outputs / "away").symlink_to("/etc/passwd")
    os.mkfifo(outputs / "pipe")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(outputs / "s.sock"))
    bound.close()
    os.link(outputs / "model.bin", outputs / "same.bin")
    (outputs / "loss\\acc.png").write_bytes(b"x")
    (outputs / "a\nb").write_bytes(b"x")
    with open(os.fsencode(outputs) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"x")
    (outputs / "tab\there").mkdir()
    (outputs / "tab\there" / "below").write_bytes(b"x")
    tree = scan(outputs)
    assert names(tree) == ["model.bin", "runs/log", "same.bin"]
    assert left_out(tree) == {
        "latest": WhyLeftOut.LINK,
        "away": WhyLeftOut.LINK,
        "pipe": WhyLeftOut.NOT_A_FILE,
        "s.sock": WhyLeftOut.NOT_A_FILE,
        "loss\\acc.png": WhyLeftOut.NAME,
        "a\\nb": WhyLeftOut.NAME,
        "caf\\xe9.txt": WhyLeftOut.NAME,
        "tab\\there": WhyLeftOut.NAME,
    }
    text = "\n".join(left_out_lines(tree.index))
    assert "latest: a link" in text
    assert "(to runs)" in text
    assert "/etc" not in text  # where an absolute link leads is the machine's own
    assert tree.read_chunk(tree.index.files[0].chunks[0].digest) == b"w" * 100


def test_of_too_many_files_the_biggest_are_carried(outputs: Path) -> None:
    for number in range(MAX_FILES + 1):
        (outputs / f"{number:05}").touch()
    tree = scan(outputs)
    assert len(tree.index.files) == MAX_FILES
    assert "model.bin" in names(tree)
    assert left_out(tree) == {"19999": WhyLeftOut.TOO_MANY, "20000": WhyLeftOut.TOO_MANY}


def test_a_file_that_is_too_big_keeps_out_no_other(outputs: Path) -> None:
    with (outputs / "a-sparse").open("wb") as file:
        file.truncate(10 * 2**30)
    (outputs / "b").write_bytes(b"b" * MIB)
    (outputs / "c").write_bytes(b"c" * MIB)
    (outputs / "d").write_bytes(b"d")
    tree = scan(outputs, max_bytes=3 * MIB // 2)
    assert names(tree) == ["b", "d", "model.bin"]
    assert left_out(tree) == {"a-sparse": WhyLeftOut.TOO_BIG, "c": WhyLeftOut.TOO_BIG}


def test_what_lies_too_deep_is_listed_once(outputs: Path) -> None:
    os.makedirs(outputs / Path(*["d"] * (MAX_DEPTH + 20)))
    (outputs / "d" / "top").write_bytes(b"t")
    tree = scan(outputs)
    assert names(tree) == ["d/top", "model.bin"]
    assert list(left_out(tree).values()) == [WhyLeftOut.TOO_DEEP]


def test_what_can_not_be_read_is_listed() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        outputs = Path(place) / "outputs"
        (outputs / "closed").mkdir(parents=True)
        (outputs / "closed" / "in").write_bytes(b"x")
        (outputs / "secret").write_bytes(b"x")
        (outputs / "model.bin").write_bytes(b"w")
        (outputs / "secret").chmod(0)
        (outputs / "closed").chmod(0)
        try:
            with as_nobody():
                tree = scan(outputs)
        finally:
            (outputs / "closed").chmod(0o700)
    assert names(tree) == ["model.bin"]
    assert left_out(tree) == {"closed": WhyLeftOut.UNREADABLE, "secret": WhyLeftOut.UNREADABLE}


def test_what_goes_away_or_is_replaced_meanwhile_is_listed(outputs: Path) -> None:
    (outputs / "a-first").write_bytes(b"1")
    (outputs / "folder").mkdir()
    (outputs / "folder" / "in").write_bytes(b"2")
    (outputs / "swapped").write_bytes(b"3")

    def has_time() -> bool:
        if (outputs / "model.bin").exists():
            (outputs / "model.bin").unlink()
            (outputs / "folder" / "in").unlink()
            (outputs / "folder").rmdir()
            (outputs / "folder").symlink_to("/etc")
            (outputs / "swapped").unlink()
            (outputs / "swapped").symlink_to("/etc/passwd")
        return True

    tree = scan_outputs(outputs, max_bytes=MIB, inside=outputs.parent, has_time=has_time)
    assert names(tree) == ["a-first"]
    assert left_out(tree) == dict.fromkeys(
        ("model.bin", "swapped", "folder/in"), WhyLeftOut.CHANGED
    )


@pytest.mark.parametrize("replaced", ["link", "file", "gone"])
def test_a_folder_that_is_none_any_more_holds_nothing(outputs: Path, replaced: str) -> None:
    (outputs / "model.bin").unlink()
    outputs.rmdir()
    if replaced == "link":
        outputs.symlink_to("/etc")
    elif replaced == "file":
        outputs.write_bytes(b"x")
    tree = scan(outputs)
    assert names(tree) == []
    assert list(left_out(tree)) == [""]


def test_when_time_is_up_the_rest_is_listed(outputs: Path) -> None:
    (outputs / "z").write_bytes(b"z")
    times = iter([True, True, False, False])
    tree = scan_outputs(
        outputs, max_bytes=MIB, inside=outputs.parent, has_time=lambda: next(times, False)
    )
    assert names(tree) == ["model.bin"]
    assert left_out(tree) == {"z": WhyLeftOut.NO_TIME}


def test_an_error_of_the_reader_is_raised(outputs: Path) -> None:
    """Without a descriptor left nothing is said about the folder."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    held = []
    try:
        for _ in range(used):
            try:
                held.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(OSError, match="Too many open files"):
            scan_outputs(outputs, max_bytes=MIB, inside=outputs.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def test_only_what_is_wanted_is_carried_or_listed(outputs: Path) -> None:
    (outputs / "old").write_bytes(b"o")
    os.mkfifo(outputs / "old-pipe")
    tree = scan_outputs(
        outputs,
        max_bytes=MIB,
        inside=outputs.parent,
        wanted=lambda path, status: not path.startswith("old"),
    )
    assert names(tree) == ["model.bin"]
    assert left_out(tree) == {}


def test_what_is_lost_on_the_way_is_listed_too(outputs: Path) -> None:
    (outputs / "b").write_bytes(b"b")
    tree = scan(outputs)
    (lost,) = (file.chunks[0].digest for file in tree.index.files if file.path == "b")
    rest = tree.without({lost: WhyLeftOut.NO_ROOM})
    assert names(rest) == ["model.bin"]
    assert left_out(rest) == {"b": WhyLeftOut.NO_ROOM}
    assert lost not in rest.sources


@pytest.mark.parametrize("text", ["a\nb", "a\x7fb", "\ud800", "x" * 301])
def test_a_list_that_can_not_be_shown_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"left_out|path|1 validation error"):
        LeftOut(path=text, why=WhyLeftOut.NAME)
    assert LeftOut(path=shown(text), why=WhyLeftOut.NAME)


def test_more_than_can_be_listed_is_counted() -> None:
    entry = LeftOut(path="x", why=WhyLeftOut.LINK)
    index = TreeIndex(files=(), left_out=(entry,) * MAX_LEFT_OUT, left_out_total=5_000)
    assert left_out_lines(index)[-1] == "and 4980 more"
    with pytest.raises(TreeRefused, match="left_out_total"):
        parse_index(index.to_bytes().replace(b'"left_out_total":5000', b'"left_out_total":3'))
