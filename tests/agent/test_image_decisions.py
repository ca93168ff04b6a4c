"""What is decided about images without any engine: addresses, pulls that stand still, what goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_agent.core.events import ImageReady, PreparationFailed
from sublet_agent.core.image_troubles import (
    FIRST_WAIT_MS,
    MOST_IMAGES,
    MOST_WAIT_MS,
    ImageTroubles,
)
from sublet_agent.core.kept_images import (
    MAX_IMAGES,
    RESERVED_BYTES,
    PulledImage,
    fits_platform,
    held_bytes,
    images_to_evict,
    room_for_images,
)
from sublet_agent.core.pull_progress import MAX_LAYERS, WORK_FACTOR, PullProgress
from sublet_agent.core.pull_troubles import PullTrouble, trouble_of
from sublet_agent.core.registry_addresses import is_public, needs_no_look, why_not
from sublet_contracts.image_references import parse_reference
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import LeaseAnswer
from tests.agent.test_core import World, only

GIB = 2**30


# -- registries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fec0::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "localhost",
        "",
        "2130706433",
    ],
)
def test_addresses_that_are_not_everybodys(address: str) -> None:
    assert not is_public(address)
    assert why_not([address])
    assert why_not(["93.184.216.34", address])


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)
    assert why_not([address]) == ""


def test_a_host_without_addresses_is_not_asked() -> None:
    assert why_not([])


def test_which_registries_need_no_look() -> None:
    here = parse_reference("reg.example:5000/a")
    assert needs_no_look(parse_reference("alpine"), ())
    assert not needs_no_look(here, ())
    assert needs_no_look(here, ("reg.example",))
    assert needs_no_look(here, ("reg.example:5000",))
    assert not needs_no_look(here, ("reg.example:5001", "example", "eg.example"))
    assert needs_no_look(parse_reference("[::1]:5000/a"), ("[::1]",))


# -- a pull ----------------------------------------------------------------------------------------


def loading(current: int, total: int, layer: str = "a", status: str = "Downloading") -> dict:
    return {"id": layer, "status": status, "progressDetail": {"current": current, "total": total}}


def pull(**changes: int) -> PullProgress:
    return PullProgress(**{"stall_ms": 1_000, "cap_bytes": GIB, "moved_ms": 0, **changes})


def test_a_pull_without_any_event_stands_still() -> None:
    assert not pull().is_still(999)
    assert pull().is_still(1_000)


def test_bytes_keep_it_alive_and_talk_does_not() -> None:
    one = pull()
    one.take({"id": "a", "status": "Pulling fs layer", "progressDetail": {}}, 100)
    one.take(loading(10, 1_000), 900)
    assert not one.is_still(1_800)
    # The same bytes again, a retry that counts down, a layer that begins anew: no bytes came.
    for at, event in enumerate(
        (
            loading(10, 1_000),
            {"id": "a", "status": "Retrying in 5 seconds"},
            {"id": "a", "status": "Retrying in 4 seconds"},
            loading(5, 1_000),
            {"status": "a line of the engine's"},
        )
    ):
        one.take(event, 1_000 + at)
    assert one.is_still(1_900)
    one.take(loading(11, 1_000), 1_900)
    assert not one.is_still(1_901)


def test_unpacking_has_longer() -> None:
    one = pull()
    one.take({"id": "a", "status": "Pulling fs layer"}, 0)
    one.take({"id": "b", "status": "Pulling fs layer"}, 0)
    one.take(loading(1_000, 1_000), 10)
    one.take({"id": "a", "status": "Download complete"}, 10)
    assert one.is_still(1_010), "b has not come yet"
    one.take(loading(5, 5, "b"), 20)
    one.take({"id": "b", "status": "Verifying Checksum"}, 20)
    assert not one.is_still(1_100)
    one.take(loading(500, 1_000, status="Extracting"), 1_100)
    assert not one.is_still(1_100 + 1_000 * WORK_FACTOR - 1)
    assert one.is_still(1_100 + 1_000 * WORK_FACTOR)


def test_too_big_is_seen_before_it_has_come() -> None:
    one = pull(cap_bytes=1_000)
    one.take(loading(1, 600), 0)
    assert not one.is_too_big
    one.take(loading(1, 600, "b"), 0)
    assert one.is_too_big
    assert one.announced_bytes == 1_200


def test_an_image_of_too_many_layers_is_not_kept_count_of() -> None:
    one = pull()
    for number in range(3 * MAX_LAYERS):
        one.take(loading(0, 0, f"layer{number}"), 0)
    assert one.is_too_big


@given(
    st.dictionaries(
        st.sampled_from(["id", "status", "progressDetail", "error"]),
        st.none() | st.integers() | st.text() | st.dictionaries(st.text(), st.integers()),
    )
)
def test_any_event_can_be_taken(event: dict) -> None:
    one = pull()
    one.take(event, 5)
    assert one.announced_bytes >= one.downloaded_bytes >= 0


# -- troubles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("manifest unknown", 404, PullTrouble.UNKNOWN),
        ("manifest unknown: manifest unknown", 500, PullTrouble.UNKNOWN),
        ("denied: requested access to the resource is denied", 403, PullTrouble.DENIED),
        ('Head "https://r/v2/x": no basic auth credentials', 500, PullTrouble.DENIED),
        ("pull access denied for x, repository does not exist or may require 'docker login'",
         0, PullTrouble.DENIED),
        ("toomanyrequests: You have reached your pull rate limit", 429, PullTrouble.BUSY),
        ("toomanyrequests: You have reached your pull rate limit", 500, PullTrouble.BUSY),
        ("received unexpected HTTP status: 503 Service Unavailable", 500, PullTrouble.DOWN),
        ("received unexpected HTTP status: 502 Bad Gateway", 500, PullTrouble.DOWN),
        ("Get https://r/v2/: dial tcp: lookup r on 10.0.0.1:53: no such host",
         500, PullTrouble.NO_HOST),
        ("dial tcp: lookup r: i/o timeout", 500, PullTrouble.NO_HOST),
        ("x509: certificate signed by unknown authority", 500, PullTrouble.NOT_TRUSTED),
        ("http: server gave HTTP response to HTTPS client", 500, PullTrouble.NOT_TRUSTED),
        ("dial tcp 192.0.2.1:443: connect: connection refused", 500, PullTrouble.UNREACHABLE),
        ("net/http: TLS handshake timeout", 500, PullTrouble.TOO_SLOW),
        ("context deadline exceeded", 500, PullTrouble.TOO_SLOW),
        ("read tcp: connection reset by peer", 0, PullTrouble.CUT_OFF),
        ("unexpected EOF", 0, PullTrouble.CUT_OFF),
        ("expected HTTP 206 from byte range request", 0, PullTrouble.CUT_OFF),
        ("error pulling image configuration: unknown blob", 0, PullTrouble.PART_MISSING),
        ("no matching manifest for linux/amd64 in the manifest list entries",
         0, PullTrouble.OTHER_PLATFORM),
        ("failed to register layer: Error processing tar file: lchown /etc/x: invalid argument",
         0, PullTrouble.NOT_MAPPED),
        ("Container ID 1000000 cannot be mapped to a host ID", 0, PullTrouble.NOT_MAPPED),
        ("write /var/lib/docker/tmp/x: no space left on device", 0, PullTrouble.NO_ROOM),
        ("filesystem layer verification failed for digest sha256:00", 0, PullTrouble.DAMAGED),
        ("manifest verification failed for digest sha256:00", 500, PullTrouble.DAMAGED),
        ("unexpected end of JSON input", 500, PullTrouble.GARBLED),
        ("something that nobody has seen yet", 500, PullTrouble.OTHER),
        ("", 0, PullTrouble.OTHER),
    ],
)  # fmt: skip
def test_what_an_engine_says_is_of_a_kind(text: str, status: int, kind: PullTrouble) -> None:
    assert trouble_of(text, status) is kind


def test_a_long_answer_costs_no_time() -> None:
    assert trouble_of("lookup " * 10_000_000) is not PullTrouble.UNKNOWN


# -- backoff ---------------------------------------------------------------------------------------


def failed(reason: Reason = Reason.PULL_FAILED) -> PreparationFailed:
    return PreparationFailed("lease", reason, "says")


def test_a_pull_that_failed_is_not_tried_for_a_while_and_longer_each_time() -> None:
    images, now_ms, wait_ms = ImageTroubles(), 1_000, FIRST_WAIT_MS
    for _ in range(10):
        images.take("a", failed(), now_ms)
        assert images.why_not("a", now_ms + 10_000).startswith(
            "image: it could not be pulled here 10 s ago"
        )
        assert images.why_not("a", now_ms + wait_ms - 1)
        assert images.why_not("a", now_ms + wait_ms) == ""
        assert images.why_not("b", now_ms) == ""
        now_ms += wait_ms
        wait_ms = min(2 * wait_ms, MOST_WAIT_MS)


def test_a_good_pull_forgets_and_others_ends_say_nothing() -> None:
    images = ImageTroubles()
    images.take("a", failed(Reason.IMAGE_UNKNOWN), 0)
    images.take("a", failed(Reason.START_FAILED), 0)
    assert images.why_not("a", 1) == ""
    images.take("a", failed(Reason.IMAGE_NOT_ALLOWED), 0)
    assert "owner" in images.why_not("a", 1)
    images.take("a", ImageReady("lease"), 2)
    assert images.why_not("a", 3) == ""
    images.take("a", failed(), 0)
    assert images.why_not("a", FIRST_WAIT_MS - 1), "the second wait is the first again"


def test_many_bad_images_do_not_fill_the_memory() -> None:
    images = ImageTroubles()
    for number in range(10 * MOST_IMAGES):
        images.take(f"image{number}", failed(), 0)
    assert len(images._troubles) == MOST_IMAGES


def test_an_agent_refuses_leases_for_an_image_that_it_could_not_pull() -> None:
    world = World()
    lease_id, _ = world.assign(world.job())
    world.do(PreparationFailed(lease_id, Reason.PULL_FAILED, "the registry is busy"))
    world.now += 5_000
    again = world.job(nonce="1" * 32)
    _, step = world.assign(again)
    refusal = only(step, LeaseAnswer).refusal
    assert refusal == "image: it could not be pulled here 5 s ago; it is tried again in 25 s"
    _, step = world.assign(world.job(nonce="2" * 32, image="other@sha256:" + "2" * 64))
    assert only(step, LeaseAnswer).signed is not None


# -- what is kept ----------------------------------------------------------------------------------


def kept(number: int, size: int = GIB, **changes: object) -> PulledImage:
    image = PulledImage(
        f"docker.io/a/b@sha256:{number:064}",
        image_id=f"sha256:{number:063}f",
        size_bytes=size,
        last_used_ms=number,
    )
    return replace(image, **changes)  # type: ignore[arg-type]


def test_the_least_recently_used_goes_first() -> None:
    images = [kept(3), kept(1), kept(2)]
    assert images_to_evict(images, 3 * GIB, ()) == []
    assert images_to_evict(images, 2 * GIB, ()) == [kept(1)]
    assert images_to_evict(images, 0, ()) == [kept(1), kept(2), kept(3)]


def test_what_is_needed_or_the_owners_stays() -> None:
    tagged = kept(1, tags=(("docker.io/a/b:1", 5),))
    owners = kept(2, owner_had=True)
    half = kept(3, image_id="")
    images = [tagged, owners, half, kept(4), kept(5)]
    in_use = {"docker.io/a/b:1", kept(4).image_id}
    assert images_to_evict(images, 0, in_use) == [kept(5)]
    assert images_to_evict(images, 0, {kept(5).pinned}) == [tagged, kept(4)]


def test_what_was_there_before_takes_none_of_the_room() -> None:
    assert held_bytes([kept(1), kept(2, owner_had=True)]) == GIB
    assert images_to_evict([kept(1), kept(2, owner_had=True)], GIB, ()) == []


def test_small_images_without_number_go_as_well() -> None:
    images = [kept(number, 1) for number in range(MAX_IMAGES + 3)]
    assert images_to_evict(images, GIB, ()) == images[:3]


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5), st.booleans()), max_size=12),
    st.integers(0, 40),
    st.sets(st.integers(0, 11)),
)
def test_the_rest_fits_or_is_needed(
    shapes: list[tuple[int, int, bool]], limit: int, used: set[int]
) -> None:
    images = [
        kept(number, size, last_used_ms=at, owner_had=owned)
        for number, (at, size, owned) in enumerate(shapes)
    ]
    in_use = {kept(number).image_id for number in used}
    gone = images_to_evict(images, limit, in_use)
    left = [image for image in images if image not in gone]
    assert not any(image.owner_had or image.image_id in in_use for image in gone)
    assert held_bytes(left) <= limit or all(
        image.owner_had or image.image_id in in_use for image in left if image.size_bytes
    )


def test_room_is_what_runs_leave_of_the_offer_and_of_the_disk() -> None:
    def room(**changes: int) -> int:
        numbers = {
            "offered_bytes": 10 * GIB,
            "reserved_bytes": 0,
            "held_bytes": 0,
            "free_bytes": 100 * GIB,
            "unwritten_bytes": 0,
        }
        return room_for_images(**{**numbers, **changes})

    assert room() == 10 * GIB
    assert room(reserved_bytes=4 * GIB) == 6 * GIB
    assert room(reserved_bytes=11 * GIB) == 0
    assert room(free_bytes=5 * GIB) == 5 * GIB - RESERVED_BYTES
    assert room(free_bytes=0, held_bytes=3 * GIB) == GIB
    assert room(offered_bytes=0) == 100 * GIB - RESERVED_BYTES
    assert room(offered_bytes=0, unwritten_bytes=90 * GIB) == 8 * GIB


def test_which_platforms_a_machine_can_run() -> None:
    assert fits_platform("amd64", [])
    assert fits_platform("amd64", [("linux", "arm64"), ("linux", "amd64")])
    assert fits_platform("amd64", [("linux", "386")])
    assert fits_platform("amd64", [("linux", "")])
    assert fits_platform("amd64", [("unknown", "unknown")])
    assert not fits_platform("amd64", [("linux", "arm64"), ("unknown", "unknown")])
    assert not fits_platform("amd64", [("windows", "amd64")])
