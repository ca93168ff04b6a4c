"""Says whether a file that a job saved is whole: by its name, its size and a little of its bytes.

Pure: who asks hands over a function that reads a piece. Nothing is unpickled, and of no file more
is read at once than MAX_READ_BYTES. Rules:

1. A file is torn that is empty though its format can't be (by its name: `_NEVER_EMPTY`).
2. What begins as its format must end as it: a ZIP (torch, .npz, .keras) with its directory,
   safetensors, .npy, HDF5 and a manifest of OCDBT (Orbax) with as many bytes as their heads
   promise, a pickle with its last opcode. JSON must parse, as a whole or line by line.
3. What begins as something else is what its script wants it to be: nobody can tell (UNKNOWN).
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Read = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there, fewer at the file's end."""

MAX_READ_BYTES = 16 * 1024 * 1024
_NEVER_EMPTY = re.compile(
    r".*\.(pt|pth|bin|ckpt|safetensors|json|npz|npy|pkl|pickle|joblib|h5|hdf5|keras|distcp)"
)
_PICKLE = re.compile(r".*\.(pkl|pickle|joblib)")
_PICKLE_BEGIN = re.compile(rb"\x80(?:[\x02-\x05]|$)")
_PICKLE_FRAME = 0x95
_ZIP, _ZIP_EMPTY, _ZIP_ENTRY = b"PK\x03\x04", b"PK\x05\x06", b"PK\x01\x02"
_ZIP64_END = b"PK\x06\x06"
_ZIP_END_BYTES = 22
_ZIP_COMMENT_BYTES = 65_535
_UNSAID = 0xFFFFFFFF
_NPY = b"\x93NUMPY"
_NPY_SHAPE = re.compile(rb"'shape': ?\(([0-9, ]{0,400})\)")
_NPY_ITEM = re.compile(rb"'descr': ?'[<>|=]([biufcmMSV])([0-9]{1,9})(?:\[[a-zA-Z0-9]{1,8}\])?'")
_NPY_HEAD_BYTES = 64 * 1024
_OCDBT_MANIFEST = b"\x0c\xdb\x3a\x2a"
_JSON_WITHOUT_ENDING = re.compile(r"(?:.*/)?(?:_METADATA|_CHECKPOINT_METADATA)")
"""what Orbax calls so"""
_OPTIMIZER = (b"param_groups", b"optimizer_states")
"""Keys of what torch's optimizers say of their state, and Lightning of them."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SAFETENSORS_HEAD_BYTES = 100_000_000
"""as the format itself bounds it"""


@dataclass(frozen=True)
class Verdict:
    """What is known of a file."""

    kind: Literal["whole", "unknown", "torn"]
    torn: str = ""
    """why it isn't whole"""


WHOLE = Verdict("whole")
"""its own format says so"""
UNKNOWN = Verdict("unknown")
"""its format is one that says nothing of where it ends"""


def check_file(path: str, size_bytes: int, read: Read) -> Verdict:
    """Judge a file. Raises what `read` raises."""
    if size_bytes == 0:
        return _torn("it is empty") if _NEVER_EMPTY.fullmatch(path) else UNKNOWN
    begin = read(0, 16)
    if size_bytes < len(_HDF5) and any(m.startswith(begin) for m in (_ZIP, _NPY, _HDF5)):
        return _torn("its head is cut off")
    if begin.startswith((_ZIP, _ZIP_EMPTY)):
        return _zip(size_bytes, read)
    if begin.startswith(_NPY):
        return _npy(size_bytes, read)
    if begin.startswith(_HDF5):
        return _hdf5(size_bytes, read)
    if path.endswith(".safetensors"):
        return _safetensors(size_bytes, read)
    if begin.startswith(_OCDBT_MANIFEST):
        promised = _number(begin, 4, 8)
        said = f"it has {size_bytes} of {promised} bytes (a manifest of OCDBT)"
        return WHOLE if size_bytes == promised else _torn(said)
    if path.endswith(".json") or (begin[:1] == b"{" and _JSON_WITHOUT_ENDING.fullmatch(path)):
        return _json(size_bytes, read)
    if _PICKLE.fullmatch(path) and _PICKLE_BEGIN.match(begin):
        return _pickle(size_bytes, begin, read)
    return UNKNOWN


def holds_optimizer(size_bytes: int, read: Read) -> bool:
    """Say whether a whole file of torch holds an optimizer's state, without which no training can
    be resumed from it. Raises what `read` raises.

    Its first entry is a pickle, which is not packed, and only searched for the names of keys.
    """
    begin = read(0, min(size_bytes, MAX_READ_BYTES))
    return begin.startswith(_ZIP) and any(key in begin for key in _OPTIMIZER)


def _torn(why: str) -> Verdict:
    return Verdict("torn", why)


def _zip(size: int, read: Read) -> Verdict:
    """The end record says where the directory begins and how long it is: it must be there."""
    end_at = size - _ZIP_END_BYTES
    end = read(max(0, end_at), _ZIP_END_BYTES)
    if end_at < 0 or not end.startswith(_ZIP_EMPTY) or end[20:22] != b"\0\0":
        # With a comment behind it, which no framework writes, it lies further ahead.
        tail = read(max(0, end_at - _ZIP_COMMENT_BYTES), _ZIP_COMMENT_BYTES + _ZIP_END_BYTES)
        found = tail.rfind(_ZIP_EMPTY)
        end = tail[found : found + _ZIP_END_BYTES]
        if found < 0 or found + _ZIP_END_BYTES + _number(end, 20, 2) != len(tail):
            return _torn("its end is missing (a ZIP, as torch and numpy write it)")
        end_at = size - len(tail) + found
    length, begins = _number(end, 12, 4), _number(end, 16, 4)
    if _UNSAID in (length, begins):
        # ZIP64: its own end record, of 56 bytes, and a locator, of 20, lie before the end record.
        end64 = read(max(0, end_at - 76), 56)
        if not end64.startswith(_ZIP64_END):
            return _torn("its end is damaged (a ZIP, as torch and numpy write it)")
        length, begins = _number(end64, 40, 8), _number(end64, 48, 8)
    if begins + length > end_at or (length and read(begins, 4) != _ZIP_ENTRY):
        return _torn("its directory is missing (a ZIP, as torch and numpy write it)")
    return WHOLE


def _npy(size: int, read: Read) -> Verdict:
    begin = read(0, 12)
    if len(begin) < 12:
        return _torn("its head is cut off (.npy)")
    wide = begin[6] > 1
    head_bytes = _number(begin, 8, 4 if wide else 2)
    data_at = (12 if wide else 10) + head_bytes
    if data_at > size:
        return _torn("its head is cut off (.npy)")
    if head_bytes > _NPY_HEAD_BYTES:
        return UNKNOWN
    head = read(12 if wide else 10, head_bytes)
    shape, item = _NPY_SHAPE.search(head), _NPY_ITEM.search(head)
    if shape is None or item is None:
        return UNKNOWN  # an array of objects, or of records
    said = [side.strip() for side in shape[1].split(b",") if side.strip()]
    if not all(side.isdigit() for side in said):
        return UNKNOWN
    sides = [int(side) for side in said]
    item_bytes = int(item[2]) if item[1] not in (b"m", b"M") else 8
    promised = data_at + math.prod(sides) * item_bytes
    if size < promised:
        return _torn(f"it has {size} of {promised} bytes (.npy)" if promised < 2**63 else "cut off")
    return WHOLE


def _hdf5(size: int, read: Read) -> Verdict:
    begin = read(0, 64)
    if len(begin) < 64:
        return _torn("its head is cut off (HDF5)")
    if begin[8] > 1:
        wide, at = begin[9], 12 + 2 * begin[9]
    else:
        wide, at = begin[13], (24 if begin[8] == 0 else 28) + 2 * begin[13]
    if wide != 8:
        return UNKNOWN
    return _torn("its end is missing (HDF5)") if size < _number(begin, at, 8) else WHOLE


def _safetensors(size: int, read: Read) -> Verdict:
    begin = read(0, 9)
    head_bytes = _number(begin, 0, 8)
    if head_bytes == 0:
        return _torn("its head is missing (safetensors)")
    if head_bytes > _SAFETENSORS_HEAD_BYTES or begin[8:9] not in (b"", b"{"):
        return UNKNOWN  # something else under that name
    if 8 + head_bytes > size:
        return _torn("its head is cut off (safetensors)")
    if head_bytes > MAX_READ_BYTES:
        return UNKNOWN
    try:
        said = json.loads(read(8, head_bytes))
        tensors = [value for name, value in said.items() if name != "__metadata__"]
        ends = [_offset(tensor["data_offsets"][1]) for tensor in tensors]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return _torn("its head can't be read (safetensors)")
    promised = 8 + head_bytes + max(ends, default=0)
    return WHOLE if size == promised else _torn(f"it has {size} of {promised} bytes (safetensors)")


def _offset(value: object) -> int:
    """Return a whole number that JSON said: it may have said Infinity. Raises ValueError."""
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("no offset")
    return value


def _json(size: int, read: Read) -> Verdict:
    if size > MAX_READ_BYTES:
        closed = read(size - 64, 64).rstrip()[-1:] in (b"}", b"]", b'"')
        return UNKNOWN if closed else _torn("its end is missing (JSON)")
    data = read(0, size)
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return _json_lines(data)
    return WHOLE


def _json_lines(data: bytes) -> Verdict:
    """Some call .json what has a value in each line."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        if len(lines) > 1:
            for line in lines:
                json.loads(line)
            return UNKNOWN  # more of them may have been meant
    except (ValueError, RecursionError):
        pass  # said below
    return _torn("it can't be read (JSON)")


def _pickle(size: int, begin: bytes, read: Read) -> Verdict:
    """Looked at from outside only: where its first frame ends, and whether it ends with STOP."""
    if read(size - 1, 1) != b".":
        return _torn("its end is missing (a pickle)")
    if len(begin) < 11 or begin[2] != _PICKLE_FRAME:
        return UNKNOWN
    frame_ends = 11 + _number(begin, 3, 8)
    if frame_ends > size:
        return _torn("its end is missing (a pickle)")
    return WHOLE if frame_ends == size else UNKNOWN


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")
