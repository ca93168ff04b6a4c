"""What every blob store promises (ports.BlobStore): one suite, as many stores as there are."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sublet_broker.service.ports import BlobMissing, BlobStore, StorageFull
from sublet_contracts.digests import digest_of, hex_of
from tests.stores.blob_stores import CAN_BE_FULL, OPENERS, BlobPlace

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one write or read of most stores


def name_of(data: bytes) -> str:
    return digest_of(data)


NAME = name_of(DATA)
OTHER = b"another"
STRICT = [name for name in OPENERS if name != "memory"]
"""Those in which a name becomes a path."""


@pytest.fixture(params=OPENERS)
def opener(request: pytest.FixtureRequest) -> Callable[[Path], BlobPlace]:
    return OPENERS[request.param]


@pytest.fixture
def place(opener: Callable[[Path], BlobPlace], tmp_path: Path) -> BlobPlace:
    return opener(tmp_path)


@pytest.fixture
def blobs(place: BlobPlace) -> BlobStore:
    return place.store


def assert_missing(blobs: BlobStore, name: str) -> None:
    assert not blobs.has(name)
    assert name not in set(blobs.names())
    with pytest.raises(BlobMissing):
        blobs.get(name)


@pytest.mark.parametrize("data", [DATA, b"x", b"", b"\0" * 100], ids=["large", "x", "empty", "0"])
def test_what_was_put_is_there_as_it_was(place: BlobPlace, data: bytes) -> None:
    name = name_of(data)
    assert_missing(place.store, name)
    place.store.put(name, data)
    for client in (place.store, place.other_client):
        assert client.has(name)
        assert client.get(name) == data
        assert list(client.names()) == [name]


def test_putting_it_again_changes_nothing(blobs: BlobStore) -> None:
    blobs.put(NAME, DATA)
    blobs.put(NAME, DATA)
    assert blobs.get(NAME) == DATA
    assert list(blobs.names()) == [NAME]


def test_names_are_those_that_are_there_each_once(place: BlobPlace) -> None:
    assert list(place.store.names()) == []
    contents = [str(number).encode() for number in range(40)]
    for data in contents:
        place.store.put(name_of(data), data)
    place.store.delete(name_of(contents[0]))
    assert sorted(place.store.names()) == sorted(name_of(data) for data in contents[1:])
    assert sorted(place.other_client.names()) == sorted(place.store.names())


def test_what_was_deleted_is_gone_and_the_rest_stays(place: BlobPlace) -> None:
    place.store.put(NAME, DATA)
    place.store.put(name_of(OTHER), OTHER)
    place.store.delete(NAME)
    for client in (place.store, place.other_client):
        assert_missing(client, NAME)
        assert client.get(name_of(OTHER)) == OTHER
    place.store.put(NAME, DATA)
    assert place.store.get(NAME) == DATA


def test_deleting_what_is_not_there_is_no_error(blobs: BlobStore) -> None:
    blobs.delete(NAME)
    blobs.put(NAME, DATA)
    blobs.delete(NAME)
    blobs.delete(NAME)
    assert_missing(blobs, NAME)


@pytest.mark.parametrize(
    "wrong", [DATA + b"!", DATA[:-1], b""], ids=["longer", "shorter", "nothing"]
)
def test_content_of_another_hash_is_refused_and_not_kept(blobs: BlobStore, wrong: bytes) -> None:
    with pytest.raises(ValueError):
        blobs.put(NAME, wrong)
    assert_missing(blobs, NAME)
    assert list(blobs.names()) == []


def test_content_of_another_hash_does_not_displace_what_is_there(blobs: BlobStore) -> None:
    blobs.put(NAME, DATA)
    with pytest.raises(ValueError):
        blobs.put(NAME, DATA + b"!")
    assert blobs.get(NAME) == DATA


@pytest.mark.parametrize("name", ["", "/", "../" + "a" * 61, NAME.upper(), NAME + "\n", NAME[:-1]])
def test_nothing_is_put_under_what_is_no_hash(blobs: BlobStore, name: str) -> None:
    with pytest.raises(ValueError):
        blobs.put(name, DATA)
    assert list(blobs.names()) == []


@pytest.mark.parametrize("data", [DATA, b""], ids=["large", "empty"])
def test_damaged_content_is_missing_once_it_was_read_and_can_be_sent_again(
    place: BlobPlace, data: bytes
) -> None:
    name = name_of(data)
    place.store.put(name, data)
    place.damage(name)
    with pytest.raises(BlobMissing, match="damaged"):
        place.store.get(name)
    for client in (place.store, place.other_client):
        assert_missing(client, name)
    place.store.put(name, data)
    assert place.other_client.get(name) == data


def test_sending_again_heals_damage_that_nobody_has_read_yet(place: BlobPlace) -> None:
    place.store.put(NAME, DATA)
    place.damage(NAME)
    place.store.put(NAME, DATA)
    assert place.other_client.get(NAME) == DATA


def test_damage_of_one_is_not_damage_of_another(place: BlobPlace) -> None:
    place.store.put(NAME, DATA)
    place.store.put(name_of(OTHER), OTHER)
    place.damage(NAME)
    assert place.store.get(name_of(OTHER)) == OTHER


@pytest.mark.parametrize("opener", [OPENERS[name] for name in CAN_BE_FULL], ids=CAN_BE_FULL)
def test_a_full_store_keeps_nothing_and_loses_nothing(
    opener: Callable[[Path], BlobPlace], tmp_path: Path
) -> None:
    place = opener(tmp_path)
    assert place.full is not None
    place.store.put(name_of(OTHER), OTHER)
    with place.full():
        with pytest.raises(StorageFull):
            place.store.put(NAME, DATA)
        assert_missing(place.store, NAME)
        assert place.store.get(name_of(OTHER)) == OTHER
    place.store.put(NAME, DATA)
    assert place.other_client.get(NAME) == DATA


def test_many_who_put_the_same_at_once_all_succeed(
    opener: Callable[[Path], BlobPlace], tmp_path: Path
) -> None:
    at_once = threading.Barrier(8)

    def put(place: BlobPlace, number: int) -> None:
        at_once.wait()
        place.store.put(NAME, DATA)
        assert (place.store if number % 2 else place.other_client).get(NAME) == DATA

    for again in range(5):
        (tmp_path / str(again)).mkdir()
        place = opener(tmp_path / str(again))
        if not place.whole:
            pytest.skip("this server shows what is half written")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(put, place), range(8)))
        assert list(place.store.names()) == [NAME]


def test_a_reader_beside_a_writer_sees_all_or_nothing(place: BlobPlace) -> None:
    if not place.whole:
        pytest.skip("this server shows what is half written")
    contents = [DATA + bytes([number]) for number in range(20)]
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for data in contents:
                # What is taken for damaged is moved away, and is missing below.
                with suppress(BlobMissing):
                    assert place.other_client.get(name_of(data)) == data

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for data in contents:
                place.store.put(name_of(data), data)
        finally:
            done.set()
        for reader in readers:
            reader.result()
    assert sorted(place.store.names()) == sorted(name_of(data) for data in contents)


# -- packs ---------------------------------------------------------------------------------------

PACK, OTHER_PACK = "a" * 64, "b" * 64
PARTS = [DATA, b"", b"x", OTHER]


def test_a_pack_is_there_as_it_was(place: BlobPlace) -> None:
    whole = b"".join(PARTS)
    for client in (place.store, place.other_client):
        assert not client.has_pack(PACK)
        with pytest.raises(BlobMissing):
            client.read_pack(PACK, 0, 1)
    place.store.put_pack(PACK, iter(PARTS))
    for client in (place.store, place.other_client):
        assert client.has_pack(PACK)
        assert list(client.packs()) == [PACK]
        assert client.read_pack(PACK, 0, len(whole)) == whole
        assert client.read_pack(PACK, len(DATA), 1) == b"x"
        assert client.read_pack(PACK, 700_000, 300_000) == whole[700_000:1_000_000]


def test_blobs_and_packs_are_apart(place: BlobPlace) -> None:
    pack = hex_of(NAME)
    place.store.put(NAME, DATA)
    place.store.put_pack(pack, [OTHER])
    assert (list(place.store.names()), list(place.store.packs())) == ([NAME], [pack])
    place.store.delete(NAME)
    assert place.store.read_pack(pack, 0, len(OTHER)) == OTHER
    place.store.put(NAME, DATA)
    place.store.delete_pack(pack)
    assert place.store.get(NAME) == DATA
    assert list(place.other_client.packs()) == []


@pytest.mark.parametrize("aside", [False, True], ids=["deleted", "set aside"])
def test_a_pack_that_went_is_gone_and_the_rest_stays(place: BlobPlace, aside: bool) -> None:
    place.store.put_pack(PACK, PARTS)
    place.store.put_pack(OTHER_PACK, [OTHER])
    for _ in range(2):  # what isn't there is no error
        (place.store.set_pack_aside if aside else place.store.delete_pack)(PACK)
    for client in (place.store, place.other_client):
        assert not client.has_pack(PACK)
        assert list(client.packs()) == [OTHER_PACK]
        with pytest.raises(BlobMissing):
            client.read_pack(PACK, 0, 1)


def test_of_a_pack_that_is_too_short_comes_what_is_there(place: BlobPlace) -> None:
    place.store.put_pack(PACK, [b"abc"])
    assert place.store.read_pack(PACK, 1, 100) == b"bc"
    assert place.store.read_pack(PACK, 3, 1) == b""
    assert place.store.read_pack(PACK, 300, 1) == b""


def test_damage_in_a_pack_hurts_what_lies_there(place: BlobPlace) -> None:
    place.store.put_pack(PACK, [b"abc", b"def"])
    place.damage_pack(PACK, 4)
    assert place.other_client.read_pack(PACK, 0, 3) == b"abc"
    assert place.other_client.read_pack(PACK, 3, 3) == b"ddf"


@pytest.mark.parametrize("opener", [OPENERS[name] for name in CAN_BE_FULL], ids=CAN_BE_FULL)
def test_a_full_store_keeps_nothing_of_a_pack(
    opener: Callable[[Path], BlobPlace], tmp_path: Path
) -> None:
    place = opener(tmp_path)
    assert place.full is not None
    with place.full():
        with pytest.raises(StorageFull):
            place.store.put_pack(PACK, PARTS)
        assert not place.store.has_pack(PACK)
        assert list(place.store.packs()) == []
    place.store.put_pack(PACK, PARTS)
    assert place.other_client.read_pack(PACK, len(DATA), 1) == b"x"


@pytest.mark.parametrize("name", ["", "../" + "a" * 61, PACK.upper(), PACK + "\n", PACK[:-1], "/"])
@pytest.mark.parametrize("opener", [OPENERS[name] for name in STRICT], ids=STRICT)
def test_an_id_that_is_none_reaches_no_file(
    opener: Callable[[Path], BlobPlace], tmp_path: Path, name: str
) -> None:
    store = opener(tmp_path).store
    for act in (
        lambda: store.put_pack(name, [b"x"]),
        lambda: store.read_pack(name, 0, 1),
        lambda: store.has_pack(name),
        lambda: store.delete_pack(name),
        lambda: store.set_pack_aside(name),
    ):
        with pytest.raises(ValueError, match="hex"):
            act()


class AnySequence(RuleBasedStateMachine):
    """The store against a dict, through both of its clients, under any sequence of calls."""

    contents = st.sampled_from([b"", b"a", b"b", OTHER, b"\0" * 70_000])
    clients = st.booleans()

    def __init__(self, place: BlobPlace) -> None:
        super().__init__()
        self.place = place
        self.kept: dict[str, bytes] = {}
        self.damaged: set[str] = set()

    def client(self, first: bool) -> BlobStore:
        return self.place.store if first else self.place.other_client

    @rule(data=contents, first=clients)
    def put(self, data: bytes, first: bool) -> None:
        self.client(first).put(name_of(data), data)
        self.kept[name_of(data)] = data
        self.damaged.discard(name_of(data))

    @rule(data=contents, first=clients)
    def put_wrongly(self, data: bytes, first: bool) -> None:
        with pytest.raises(ValueError):
            self.client(first).put(name_of(data), data + b"!")

    @rule(data=contents, first=clients)
    def delete(self, data: bytes, first: bool) -> None:
        self.client(first).delete(name_of(data))
        self.kept.pop(name_of(data), None)
        self.damaged.discard(name_of(data))

    @rule(data=contents)
    def damage(self, data: bytes) -> None:
        if name_of(data) in self.kept and name_of(data) not in self.damaged:
            self.place.damage(name_of(data))
            self.damaged.add(name_of(data))

    @rule(data=contents, first=clients)
    def get(self, data: bytes, first: bool) -> None:
        name = name_of(data)
        if name in self.kept and name not in self.damaged:
            assert self.client(first).get(name) == data
            return
        with pytest.raises(BlobMissing):
            self.client(first).get(name)
        self.kept.pop(name, None)
        self.damaged.discard(name)

    @invariant()
    def both_clients_name_what_lies_there(self) -> None:
        for client in (self.place.store, self.place.other_client):
            assert sorted(client.names()) == sorted(self.kept)
            assert all(client.has(name) for name in self.kept)


def test_any_sequence_of_calls(opener: Callable[[Path], BlobPlace]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        examples = opener(Path(tempfile.mkdtemp(dir=folder))).examples

        def machine() -> AnySequence:
            return AnySequence(opener(Path(tempfile.mkdtemp(dir=folder))))

        run_state_machine_as_test(
            cast(type[AnySequence], machine),  # it is only called, once an example
            settings=settings(max_examples=examples, stateful_step_count=25, deadline=None),
        )
