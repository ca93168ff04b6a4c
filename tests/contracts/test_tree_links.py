"""Links in a tree lead to something inside of it, wherever it is written, or are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_contracts.tree import TreeRefused, parse_index
from sublet_contracts.tree_links import TreeLink
from tests.trees import write_tree


def index_of(*links: tuple[str, str], files: tuple[str, ...] = ()) -> bytes:
    listed = [{"path": f, "size_bytes": 0, "executable": False, "chunks": []} for f in files]
    linked = [{"path": path, "target": target} for path, target in links]
    return json.dumps({"version": 1, "files": listed, "links": linked}).encode()


def test_links_are_written_as_they_are(tmp_path: Path) -> None:
    index = parse_index(index_of(("a/b/up", "../../x"), ("here", "."), ("z", "a/b"), files=("x",)))
    write_tree(index, tmp_path, lambda digest: b"")
    found = {path: os.readlink(tmp_path / path) for path in ("a/b/up", "here", "z")}
    assert found == {"a/b/up": "../../x", "here": ".", "z": "a/b"}
    assert (tmp_path / "a/b/up").resolve() == (tmp_path / "x").resolve()


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("a", "/etc/passwd"), ("a", ".."), ("a", "../x"), ("a/b", "../../x"), ("a", ""),
        ("a", "b/../../x"), ("a", "d/.."), ("a/b", "./x"), ("a", "b//c"), ("a", "b\0"),
        ("a", "x" * 2_000), ("../a", "x"), ("/a", "x"), ("a", "b\\c"), ("a", "\udcff"),
    ],
)  # fmt: skip
def test_a_link_that_may_lead_out_is_refused(path: str, target: str) -> None:
    with pytest.raises(ValueError, match=r"link|path|plain|part"):
        TreeLink(path=path, target=target)


@pytest.mark.parametrize(
    ("links", "files"),
    [
        ((("a", "b"), ("a/c", "b")), ()),
        ((("a", "b"),), ("a/c",)),
        ((("a", "b"),), ("a",)),
        ((("a/b", "c"),), ("a",)),
        ((("b", "c"), ("a", "c")), ()),
        ((("a", "c"), ("a", "d")), ()),
    ],
)
def test_nothing_lies_below_a_link_or_in_its_place(
    links: tuple[tuple[str, str], ...], files: tuple[str, ...]
) -> None:
    with pytest.raises(TreeRefused, match="links"):
        parse_index(index_of(*links, files=files))


_NAMES = st.sampled_from(["a", "b", "c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_TARGETS = st.lists(st.sampled_from(["..", ".", "a", "b", "c"]), min_size=1, max_size=5)


@given(links=st.dictionaries(_PATHS, _TARGETS.map("/".join), max_size=5))
def test_no_way_through_accepted_links_leads_out(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, str]
) -> None:
    """Whatever is accepted, the system itself finds every link's target inside, or a loop."""
    try:
        index = parse_index(index_of(*sorted(links.items())))
    except TreeRefused:
        return
    root = tmp_path_factory.mktemp("tree")
    write_tree(index, root, lambda digest: b"")
    for link in index.links:
        for more in ("", "/a", "/b/c"):
            try:
                found = Path(os.path.realpath(f"{root / link.path}{more}", strict=True))
            except OSError:
                continue  # it leads to nothing, or round in a circle
            assert found.is_relative_to(root.resolve())
