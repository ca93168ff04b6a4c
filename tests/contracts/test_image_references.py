"""Names of images: what is one, what it means written out, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_contracts.image_references import (
    MAX_CHARACTERS,
    ReferenceRefused,
    can_mean,
    has_tag,
    host_and_port,
    is_image_id,
    is_registry,
    parse_reference,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "written_out"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3", "docker.io/library/alpine:3"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/library/alpine", "docker.io/library/alpine:latest"),
        ("user/tool", "docker.io/user/tool:latest"),
        ("local/python", "docker.io/local/python:latest"),
        ("localhost/tool:1", "localhost/tool:1"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        ("127.0.0.1:5000/t/img:1", "127.0.0.1:5000/t/img:1"),
        ("[2001:db8::1]:5000/x", "[2001:db8::1]:5000/x:latest"),
        ("GHCR.io/a/b_c/d__e/f--g.h:V1.0-rc_1", "ghcr.io/a/b_c/d__e/f--g.h:V1.0-rc_1"),
        (f"a/b@{DIGEST}", f"docker.io/a/b@{DIGEST}"),
        (f"reg.example:443/a/b:tag@{DIGEST}", f"reg.example:443/a/b@{DIGEST}"),
    ],
)
def test_a_name_is_written_out(text: str, written_out: str) -> None:
    reference = parse_reference(text)
    assert str(reference) == written_out
    assert parse_reference(written_out) == reference
    assert reference.is_pinned == ("@" in text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../images",
        "./images",
        "/images",
        "images/",
        "a//b",
        "a/../b",
        "Images",
        "user/Tool",
        "a b",
        "a\n",
        "a\x00b",
        "a\x1b[31m",
        "\u0430lpine",
        "a:",
        "a:-x",
        "a:" + "t" * 129,
        "a:b:c",
        "a@",
        "a@sha256:" + "0" * 63,
        "a@sha256:" + "G" * 64,
        "a@sha512:" + "0" * 128,
        f"a@{DIGEST}@{DIGEST}",
        f"@{DIGEST}",
        DIGEST,
        "0" * 64,
        "-a",
        "a-",
        "a.-b",
        "a___b",
        "http://reg.example/a",
        "user:secret@reg.example/a",
        "reg.example:99999/a",
        "reg.example:/a",
        "reg..example/a",
        "-reg.example/a",
        "[::1/a",
        "reg.example/a?x=1",
        "reg.example/a#b",
        "reg.example/a%2e",
        "$(id)",
        "a" * 10_240,
        "a/" * 250 + "b",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ReferenceRefused) as refused:
        parse_reference(text)
    said = str(refused.value)
    assert len(said) < 300
    assert said.isprintable()
    assert said.isascii()


@given(st.text(max_size=MAX_CHARACTERS + 50))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ReferenceRefused:
        return
    assert parse_reference(str(reference)) == reference
    assert str(reference).isascii()


@given(st.from_regex(r"[a-zA-Z0-9.:/@_\[\]-]{1,80}", fullmatch=True))
def test_a_text_of_its_own_characters_too(text: str) -> None:
    test_any_text_is_a_name_or_refused.hypothesis.inner_test(text)  # type: ignore[attr-defined]


def test_registries_and_ids() -> None:
    assert host_and_port("reg.example:5000") == ("reg.example", 5000)
    assert host_and_port("reg.example") == ("reg.example", None)
    assert host_and_port("[::1]:5000") == ("::1", 5000)
    assert host_and_port("[::1]") == ("::1", None)
    assert all(map(is_registry, ("localhost", "reg.example:5000", "10.0.0.1", "[::1]:1")))
    assert not any(map(is_registry, ("", "a/b", "http://a", "a:", "a:99999", "a b", "*")))
    assert is_image_id(DIGEST)
    assert not is_image_id(DIGEST[:-1])
    assert not is_image_id("f" * 64)


@pytest.mark.parametrize(
    ("image", "has"),
    [
        ("python", True),
        ("python:3.12", True),
        ("r.example:5000/a/b:1", True),
        (f"python@{DIGEST}", False),
        (f"python:3.12@{DIGEST}", False),
        (DIGEST, False),
        ("../images", False),
        ("", False),
    ],
)
def test_what_may_come_to_mean_another_image(image: str, has: bool) -> None:
    assert has_tag(image) is has


@pytest.mark.parametrize(
    ("image", "pinned", "can"),
    [
        ("python:3.12", f"docker.io/library/python@{DIGEST}", True),
        ("python", f"python@{DIGEST}", True),
        ("python:3.12", DIGEST, True),
        ("python:3.12", f"docker.io/other/python@{DIGEST}", False),
        ("python:3.12", f"r.example/library/python@{DIGEST}", False),
        ("python:3.12", "docker.io/library/python:3.12", False),
        ("python:3.12", "", False),
        ("python:3.12", "..", False),
        (f"python@{DIGEST}", f"docker.io/library/python@{DIGEST}", False),
        (DIGEST, DIGEST, False),
        ("../images", DIGEST, False),
    ],
)
def test_what_a_tag_can_have_meant(image: str, pinned: str, can: bool) -> None:
    assert can_mean(image, pinned) is can
