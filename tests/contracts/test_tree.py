"""Trees: there and back, and what a job or a stranger may put in the way."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sublet_contracts import cuts, tree
from sublet_contracts.digests import digest_of
from sublet_contracts.paths import check_relative_path
from sublet_contracts.tree import (
    CHUNK_BYTES,
    Chunk,
    FileContent,
    ScannedTree,
    TreeFile,
    TreeIndex,
    TreeRefused,
    parse_index,
    scan_tree,
)
from tests.trees import write_tree

MAX = 10**9


def sha(data: bytes) -> str:
    return digest_of(data)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def read_back(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def one_file(data: bytes, *, path: str = "a", chunks: tuple[Chunk, ...] | None = None) -> TreeIndex:
    pieces = (Chunk(digest=sha(data), size_bytes=len(data)),) if chunks is None else chunks
    size = sum(piece.size_bytes for piece in pieces)
    return TreeIndex(files=(TreeFile(path=path, size_bytes=size, chunks=pieces),))


# There and back


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    files = {
        "weights.bin": os.urandom(CHUNK_BYTES) + b"w",
        "a/b/c.txt": b"c",
        "a.txt": b"",
        "a-1": b"x",
        "größe 李.csv": b"1,2\n",
        "again.bin": b"c",
    }
    source = fill(tmp_path / "source", files)
    (source / "a-1").chmod(0o755)
    (source / "empty").mkdir()
    seen: list[int] = []

    def on_chunk(chunk: tree.Chunk, path: Path, offset: int) -> None:
        seen.append(chunk.size_bytes)
        assert digest_of(path.read_bytes()[offset : offset + chunk.size_bytes]) == chunk.digest

    scanned = scan_tree(source, max_bytes=MAX, on_chunk=on_chunk)

    assert [file.path for file in scanned.index.files] == sorted(files)
    assert scanned.index.total_bytes == sum(map(len, files.values())) == sum(seen)
    assert len(scanned.index.chunks()) == len(scanned.sources) == 5  # the two "c" move once
    index = parse_index(scanned.index.to_bytes())
    assert index == scanned.index

    write_tree(index, tmp_path / "target", scanned.read_chunk)
    assert read_back(tmp_path / "target") == files
    modes = {p.name: bool(p.stat().st_mode & stat.S_IXUSR) for p in (tmp_path / "target").iterdir()}
    assert modes["a-1"]
    assert not modes["a.txt"]


def test_a_lone_file_keeps_its_name(tmp_path: Path) -> None:
    path = fill(tmp_path, {"data.csv": b"1,2"}) / "data.csv"
    scanned = scan_tree(path, max_bytes=MAX)
    assert [file.path for file in scanned.index.files] == ["data.csv"]
    assert scanned.read_chunk(sha(b"1,2")) == b"1,2"


def test_a_file_in_a_folder_of_its_own_name(tmp_path: Path) -> None:
    folder = fill(tmp_path / "same", {"same": b"inner"})
    assert scan_tree(folder, max_bytes=MAX).read_chunk(sha(b"inner")) == b"inner"


def test_skipped_names_count_at_the_top_only(tmp_path: Path) -> None:
    fill(tmp_path, {"DONE": b"1", "sub/DONE": b"2"})
    scanned = scan_tree(tmp_path, max_bytes=MAX, skip=frozenset({"DONE"}))
    assert [file.path for file in scanned.index.files] == ["sub/DONE"]


@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(/[A-Z]{1,2})?", fullmatch=True),
        st.binary(max_size=50),
        max_size=6,
    ),
    chunk_bytes=st.integers(1, 17),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
def test_chunks_meet_at_every_boundary(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], chunk_bytes: int
) -> None:
    # A name can't be a file and a folder at once.
    files = {
        n: d for n, d in files.items() if "/" in n or not any(o.startswith(n + "/") for o in files)
    }
    root = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "CHUNK_BYTES", chunk_bytes)
        source = fill(root / "source", files) if files else root
        scanned = scan_tree(source, max_bytes=MAX)
        for file in scanned.index.files:
            sizes = [chunk.size_bytes for chunk in file.chunks]
            assert all(size == chunk_bytes for size in sizes[:-1])
            assert all(0 < size <= chunk_bytes for size in sizes)
        write_tree(parse_index(scanned.index.to_bytes()), root / "target", scanned.read_chunk)
    assert read_back(root / "target") == files


# What a scan refuses


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan_tree(tmp_path / "nothing", max_bytes=MAX)
    with pytest.raises(FileNotFoundError):
        scan_tree(tmp_path / "nothing", max_bytes=MAX, inside=tmp_path)


def test_links_are_refused_at_the_root_and_below(tmp_path: Path) -> None:
    secret = fill(tmp_path / "secret", {"key": b"secret"})
    (tmp_path / "root").symlink_to(secret)
    with pytest.raises(TreeRefused, match="is a link"):
        scan_tree(tmp_path / "root", max_bytes=MAX)
    for name, target in (("file", secret / "key"), ("folder", secret), ("broken", tmp_path / "no")):
        folder = tmp_path / f"has-{name}"
        folder.mkdir()
        (folder / name).symlink_to(target)
        with pytest.raises(TreeRefused, match=f"{name} is a link"):
            scan_tree(folder, max_bytes=MAX)


def test_a_link_above_the_root_is_refused_where_the_folder_is_a_jobs(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", {"step-1/key": b"secret"})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "out").symlink_to(tmp_path / "elsewhere")
    root = tmp_path / "checkpoint" / "out" / "step-1"
    assert scan_tree(root, max_bytes=MAX).index.files  # the caller vouches for the path
    with pytest.raises(TreeRefused, match="out is a link"):
        scan_tree(root, max_bytes=MAX, inside=tmp_path / "checkpoint")
    fill(tmp_path, {"mine/out/step-1/w": b"w"})
    scanned = scan_tree(tmp_path / "mine/out/step-1", max_bytes=MAX, inside=tmp_path / "mine")
    assert scanned.read_chunk(sha(b"w")) == b"w"


def swap_before_open(monkeypatch: pytest.MonkeyPatch, name: str, swap: Callable[[], None]) -> None:
    """Call `swap` when `name` has been looked at and is about to be opened."""
    real = os.open
    done: list[bool] = []

    def swapping(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path).name == name and not done:
            done.append(True)
            swap()
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", swapping)


def test_a_file_that_is_swapped_for_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = fill(tmp_path / "secret", {"key": b"secret"})
    victim = fill(tmp_path / "tree", {"w": b"w"}) / "w"

    def swap() -> None:
        victim.unlink()
        victim.symlink_to(secret / "key")

    swap_before_open(monkeypatch, "w", swap)
    with pytest.raises(TreeRefused, match="w is a link"):
        scan_tree(tmp_path / "tree", max_bytes=MAX)


def test_a_folder_that_is_swapped_for_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = fill(tmp_path / "secret", {"w": b"secret"})
    victim = fill(tmp_path / "tree", {"sub/w": b"w"}) / "sub"

    def swap() -> None:
        victim.rename(tmp_path / "aside")
        victim.symlink_to(secret)

    swap_before_open(monkeypatch, "sub", swap)
    with pytest.raises(TreeRefused):
        scan_tree(tmp_path / "tree", max_bytes=MAX)


def test_a_folder_swapped_after_it_was_opened_yields_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = fill(tmp_path / "secret", {"w": b"secret"})
    victim = fill(tmp_path / "tree", {"sub/w": b"w"}) / "sub"

    def swap() -> None:
        victim.rename(tmp_path / "aside")
        victim.symlink_to(secret)

    swap_before_open(monkeypatch, "w", swap)
    index = scan_tree(tmp_path / "tree", max_bytes=MAX).index
    assert [chunk.digest for file in index.files for chunk in file.chunks] == [sha(b"w")]


def test_a_file_that_vanishes_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = fill(tmp_path / "tree", {"w": b"w"}) / "w"
    swap_before_open(monkeypatch, "w", victim.unlink)
    with pytest.raises(TreeRefused, match="w changed while it was being read"):
        scan_tree(tmp_path / "tree", max_bytes=MAX)


@pytest.mark.parametrize("at_root", [True, False])
def test_a_pipe_is_refused_and_waits_for_nobody(tmp_path: Path, at_root: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(TreeRefused, match="neither a file nor a folder"):
        scan_tree(pipe if at_root else tmp_path, max_bytes=MAX)


def test_names_that_no_index_can_hold_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate((b"new\nline", b"back\\slash", b"latin-\xe9")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with open(os.path.join(os.fsencode(folder), name), "wb"):
            pass
        with pytest.raises(TreeRefused, match=r"control character|not UTF-8"):
            scan_tree(folder, max_bytes=MAX)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"/".join(["d" * 200] * 6): b"x"})
    with pytest.raises(TreeRefused, match="too long"):
        scan_tree(tmp_path, max_bytes=MAX)


def test_size_and_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a": b"12345", "b": b"67890", "c/d": b""})
    scan_tree(tmp_path, max_bytes=10)
    with pytest.raises(TreeRefused, match="more than 9 bytes"):
        scan_tree(tmp_path, max_bytes=9)
    monkeypatch.setattr(tree, "MAX_FILES", 2)
    with pytest.raises(TreeRefused, match="more than 2 files"):
        scan_tree(tmp_path, max_bytes=10)
    monkeypatch.setattr(tree, "MAX_FILES", 1)
    with pytest.raises(TreeRefused, match="more than 2 files and folders"):
        scan_tree(tmp_path, max_bytes=10)


def test_a_sparse_file_without_end_stops_at_the_limit(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(TreeRefused, match="more than 1000 bytes"):
        scan_tree(tmp_path, max_bytes=1000)


def test_a_scan_leaves_no_descriptor_open(tmp_path: Path) -> None:
    fill(tmp_path, {"a/b/c": b"1", "d": b"2"})
    (tmp_path / "z").symlink_to("d")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(TreeRefused):
            scan_tree(tmp_path, max_bytes=MAX)
    assert set(os.listdir("/proc/self/fd")) == before


# Changed under upload


@pytest.fixture
def scanned(tmp_path: Path) -> ScannedTree:
    fill(tmp_path / "tree", {"w": b"before"})
    return scan_tree(tmp_path / "tree", max_bytes=MAX)


def change(path: Path) -> None:
    path.write_bytes(b"after!")


def shorten(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


@pytest.mark.parametrize("meddle", [change, shorten, remove, make_pipe, make_link])
def test_what_changed_since_it_was_scanned_is_not_uploaded(
    tmp_path: Path, scanned: ScannedTree, meddle: Callable[[Path], None]
) -> None:
    assert scanned.read_chunk(sha(b"before")) == b"before"
    meddle(tmp_path / "tree" / "w")
    with pytest.raises(TreeRefused):
        scanned.read_chunk(sha(b"before"))


# What an index may not say

GOOD = json.loads(one_file(b"abc").to_bytes())


def index_with(**change: Any) -> bytes:
    return json.dumps({**GOOD, "files": [{**GOOD["files"][0], **change}]}).encode()


def index_of(*paths: str) -> bytes:
    return json.dumps({**GOOD, "files": [{**GOOD["files"][0], "path": p} for p in paths]}).encode()


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../a",
        "a/../b",
        "a/..",
        ".",
        "./a",
        "a/./b",
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "a\0b",
        "a\nb",
        "a\\b",
        "\x7f",
        "a" * 256,
        "ä" * 128,
        "/".join(["a" * 200] * 6),
    ],
)
def test_a_path_that_could_leave_the_tree_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"plain relative path|control character|too long"):
        check_relative_path(path)
    with pytest.raises(TreeRefused, match=r"files\.0\.path"):
        parse_index(index_of(path))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (index_of("b", "a"), "sorted"),
        (index_of("a", "a"), "once each"),
        (index_of("a", "a/b"), "lies below something that is a file"),
        (index_of("a", "a-b", "a/b/c"), "lies below something that is a file"),
        (index_with(size_bytes=4), "don't add up"),
        (index_with(size_bytes=3.0), "not an integer"),
        (index_with(executable=1), "valid boolean"),
        (index_with(mode=0o4755), "not permitted"),
        (index_with(target="/etc/passwd"), "not permitted"),
        (index_with(chunks=[{"digest": sha(b"abc"), "size_bytes": 0}]), "greater than or equal"),
        (index_with(chunks=[{"digest": sha(b"a"), "size_bytes": CHUNK_BYTES + 1}]), "less than"),
        (index_with(chunks=[{"digest": "../../etc", "size_bytes": 3}]), "pattern"),
        (
            index_with(
                chunks=[
                    {"digest": "blake3:" + "a" * 64, "size_bytes": 1},
                    {"digest": "blake3:" + "a" * 64, "size_bytes": 2},
                ]
            ),
            "two sizes",
        ),
        (json.dumps({**GOOD, "version": 2}).encode(), "version"),
        (json.dumps({"version": 1}).encode(), "files: Field required"),
        (b'{"files":[],"files":[]}', "stands twice"),
        (b"[" * 100_000, "deeper than"),
        (b" " * (tree.MAX_INDEX_BYTES + 1), "at most 16777216"),
        (b"\x80", "not UTF-8"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_an_index_that_breaks_a_rule_is_refused(data: bytes, error: str) -> None:
    with pytest.raises(TreeRefused, match=f"the tree index is refused: .*{error}"):
        parse_index(data)


def test_an_index_of_nothing_is_an_index(tmp_path: Path) -> None:
    assert parse_index(b'{"files":[]}').total_bytes == 0
    assert scan_tree(tmp_path, max_bytes=0).index.files == ()


# What is not written


def test_nothing_is_written_through_or_over_what_is_there(tmp_path: Path) -> None:
    outside = fill(tmp_path, {"outside": b"precious"}) / "outside"
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").symlink_to(outside)
    with pytest.raises(FileExistsError):
        write_tree(one_file(b"abc"), target, lambda _: b"abc")
    assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5])
@pytest.mark.parametrize("piece", [CHUNK_BYTES, 1_000_003])
def test_a_files_content_has_one_name_however_it_is_read(
    tmp_path: Path, size: int, piece: int
) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (file,) = scan_tree(fill(tmp_path / "tree", {"a": data}), max_bytes=MAX).index.files
    passing = FileContent()
    for at in range(0, size, piece):
        passing.update(data[at : at + piece])
    assert passing.name() == file.content
    other = FileContent()
    other.update(data + b"!")
    assert other.name() != file.content
