"""Whether a saved file is whole, by what its format says of its end: cut anywhere, it is not."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable

import pytest

from sublet_contracts.file_formats import (
    MAX_READ_BYTES,
    UNKNOWN,
    WHOLE,
    Verdict,
    check_file,
    holds_optimizer,
)


def judged(name: str, data: bytes) -> Verdict:
    return check_file(name, len(data), lambda offset, length: data[offset : offset + length])


def torch_file(content: bytes = b"weights " * 40) -> bytes:
    """As torch.save writes: a ZIP, stored."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", content)
    return file.getvalue()


def zip64_file() -> bytes:
    """As torch and numpy write what is larger than 4 GiB: here its directory is merely said to be
    there."""
    plain = torch_file()
    at = plain.rindex(b"PK\x05\x06")
    size, begins = struct.unpack("<II", plain[at + 12 : at + 20])
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, size, begins)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    end = plain[at : at + 12] + struct.pack("<IIH", 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return plain[:at] + end64 + locator + end


def npy_file(shape: str = "(3, 4)", descr: str = "'<f8'", data_bytes: int = 96) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = head.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(data_bytes)


def safetensors_file(data_bytes: int = 64) -> bytes:
    said = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [16], "data_offsets": [0, data_bytes]},
    }
    head = json.dumps(said).encode()
    return struct.pack("<Q", len(head)) + head + bytes(data_bytes)


def headed(head: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head


def hdf5_file(version: int) -> bytes:
    if version < 2:
        head = b"\x89HDF\r\n\x1a\n" + bytes([version, 0, 0, 0, 0, 8, 8, 0]) + bytes(8)
        head += bytes(4) if version else b""
    else:
        head = b"\x89HDF\r\n\x1a\n" + bytes([version, 8, 8, 0])
    return (head + bytes(16) + struct.pack("<Q", 200)).ljust(200, b"\0")


WHOLE_FILES: dict[str, bytes] = {
    "optimizer.pt": torch_file(),
    "large.pth": zip64_file(),
    "state.npz": torch_file(),
    "last.ckpt": torch_file(),
    "weights.npy": npy_file(),
    "dates.npy": npy_file("(5,)", "'<M8[us]'", 40),
    "number.npy": npy_file("()", "'<f8'", 8),
    "model.safetensors": safetensors_file(),
    "none.safetensors": safetensors_file(0),
    "trainer_state.json": b'{"global_step": 20, "loss": NaN}\n',
    "state.pkl": pickle.dumps({"iteration": 3, "weights": list(range(99))}, protocol=5),
    "old.h5": hdf5_file(0),
    "older.h5": hdf5_file(1),
    "new.h5": hdf5_file(3),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_is_whole_until_it_is_cut(name: str) -> None:
    data = WHOLE_FILES[name]
    assert judged(name, data) == WHOLE
    for length in range(len(data) - 1 - data.endswith(b"\n"), -1, -1):
        cut = judged(name, data[:length])
        assert cut.kind == "torn", f"cut to {length} of {len(data)} bytes: {cut}"
        assert cut.torn


@pytest.mark.parametrize(
    "ending", ["pt", "pth", "bin", "ckpt", "safetensors", "json", "npz", "npy"]
)
def test_a_file_whose_format_is_never_empty_is_torn_when_it_is(ending: str) -> None:
    assert judged(f"run/a.{ending}", b"").kind == "torn"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"x" * 100),
        ("optimizer.pt", b"x" * 100),
        ("pytorch_model.bin", bytes(100)),
        ("old.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
        ("notes.txt", b""),
        ("done", b""),
        ("results.json", b'{"a": 1}\n{"a": 2}\n'),
        ("objects.npy", npy_file("(1,)", "'|O'", 3)),
        ("odd.npy", npy_file("(3 4)")),
        ("lists.pkl", pickle.dumps([1, 2, 3], protocol=2)),
    ],
)
def test_what_says_nothing_of_its_end_is_left_to_its_script(name: str, data: bytes) -> None:
    assert judged(name, data) == UNKNOWN


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("a.safetensors", lambda: struct.pack("<Q", 8) + b'{"a": 1}'),
        ("a.safetensors", lambda: struct.pack("<Q", 2) + b"{]"),
        ("a.safetensors", lambda: safetensors_file() + b"more"),
        ("a.safetensors", lambda: bytes(64)),
        ("a.json", lambda: b'{"global_step": 20, "max_st'),
        ("a.json", lambda: b"[" * 100_000),
        ("a.json", lambda: b'{"a": 1}\n{"a": '),
        ("a.pt", lambda: torch_file()[:-22] + bytes(22)),
        ("a.pt", lambda: b"PK\x03\x04" + bytes(200) + torch_file()[-22:]),
        ("a.npy", lambda: npy_file("(9999999999999999999999999,)")),
        ("a.safetensors", lambda: headed(b'{"w": {"data_offsets": [0, Infinity]}}')),
        ("a.safetensors", lambda: headed(b'{"w": {"data_offsets": [0, -9]}}')),
    ],
)
def test_a_file_that_contradicts_itself_is_torn(name: str, spoilt: Callable[[], bytes]) -> None:
    assert judged(name, spoilt()).kind == "torn"


def test_a_zip_may_have_a_comment() -> None:
    file = io.BytesIO(torch_file())
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"made by hand"
    assert judged("a.pt", file.getvalue()) == WHOLE
    assert judged("a.pt", file.getvalue()[:-1]).kind == "torn"


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "a.pt", "a.npy", "a.pkl", "a.h5"])
def test_however_large_a_file_is_little_is_read(name: str) -> None:
    """A sparse file of a terabyte, whose beginning promises what it likes."""
    read_bytes = 0
    begins = {"a.json": b"[", "a.pkl": b"\x80\x04\x95"}.get(name, b"")
    begins = begins or WHOLE_FILES.get({"a.pt": "optimizer.pt"}.get(name, ""), b"")[:30]
    begins = begins or struct.pack("<Q", 99_000_000) + b"{"

    def read(offset: int, length: int) -> bytes:
        nonlocal read_bytes
        read_bytes += length
        return (begins[offset:] + bytes(length))[:length] if offset < 64 else bytes(length)

    check_file(name, 1 << 40, read)
    assert read_bytes <= MAX_READ_BYTES + (1 << 20)


def test_a_manifest_of_orbax_has_as_many_bytes_as_it_says() -> None:
    whole = b"\x0c\xdb\x3a\x2a" + (20).to_bytes(8, "little") + b"12345678"
    assert judged("ckpts/1/default/manifest.ocdbt", whole).kind == "whole"
    assert judged("manifest.ocdbt", whole[:-1]).kind == "torn"
    assert judged("1/_CHECKPOINT_METADATA", b'{"item_handlers": {}').kind == "torn"
    assert judged("1/_CHECKPOINT_METADATA", b'{"item_handlers": {}}').kind == "whole"
    assert judged("other/_METADATA", b"plain text").kind == "unknown"


@pytest.mark.parametrize(
    ("content", "holds"),
    [(b"X\x0c\0\0\0param_groups", True), (b"optimizer_states", True), (b"layers.weight", False)],
)
def test_whether_a_file_of_torch_holds_an_optimizer(content: bytes, holds: bool) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("archive/data.pkl", content)
    data = packed.getvalue()
    assert holds_optimizer(len(data), lambda at, length: data[at : at + length]) is holds
    assert not holds_optimizer(20, lambda at, length: b"param_groups, not a ZIP")
