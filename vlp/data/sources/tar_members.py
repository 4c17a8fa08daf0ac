"""The members of a tar file, by their headers.

Headers are read here rather than by `tarfile`, which keeps every member in memory and follows a negative size for ever.
"""

import dataclasses
import io
from collections.abc import Iterator

from vlp.data import storage

BLOCK = 512
LONGEST_NAME = 2**24  # bytes of a header's own records; what says more is damaged


class _Damaged(Exception):
    """A block that is no header, or the header of a member (its name, if known) that cannot be."""


@dataclasses.dataclass(frozen=True)
class Member:
    """An entry of a tar. kind: "file", "sparse", "link" (or device), "other"; or where a whole archive
    ends: "end" (its mark), "truncated" (a file that stops; `name` has begun), "damaged" and "trailing" (no
    tar from `offset` on)."""

    kind: str
    name: bytes = b""
    offset: int = 0
    size: int = 0


def members(path: str) -> Iterator[Member]:
    """Yields what a tar holds, through all archives that were joined in it, at a constant cost in memory."""
    total, at, ended = storage.size(path), 0, False
    file = io.BufferedReader(storage.File(path), 2**14)

    def bytes_at(offset: int, num: int) -> bytes:
        file.seek(offset)
        return file.read(num)

    pax: dict[bytes, bytes] = {}  # of the next member
    shared: dict[bytes, bytes] = {}  # of all that follow
    while at < total:
        block = bytes_at(at, BLOCK)
        if not any(block):
            if not ended:
                yield Member("end")
            ended, at = True, at + BLOCK
            continue
        try:
            if len(block) < BLOCK:
                raise _Damaged
            name, size, kind = _header(block)
            body, longest = at + BLOCK, kind in b"xgXLK"
            if longest and size > LONGEST_NAME:
                raise _Damaged
            if not longest and b"size" in pax:
                size = _whole(pax[b"size"], 10, name=name)
            if kind in b"123456":
                size = 0
            more = kind == b"S" and block[482]
            while more:  # a map of a sparse file, continued
                more, body = (bytes_at(body, BLOCK) or bytes(BLOCK))[504:505] > b"\0", body + BLOCK
            stop = body + size
            if longest and stop <= total:
                data = bytes_at(body, size)
                if kind in b"xgX":
                    (shared if kind == b"g" else pax).update(_records(data))
                else:
                    pax[b"path" if kind == b"L" else b"linkpath"] = data.split(b"\0", 1)[0]
                at = body + -(-size // BLOCK) * BLOCK
                continue
        except _Damaged as e:
            if len(block) < BLOCK and not ended:
                yield Member("truncated")
            else:
                kind, name = "trailing" if ended else "damaged", (*e.args, b"")[0]
                yield Member(kind, name, at, total - at)
            return
        ended, own, pax = False, shared | pax, {}
        name = own.get(b"GNU.sparse.name") or own.get(b"path") or name
        if stop > total:
            yield Member("truncated", b"" if longest else name)
            return
        if kind == b"S" or any(k.startswith(b"GNU.sparse.") for k in own):
            yield Member("sparse", name)
        elif kind in b"123456":
            if kind != b"5":
                yield Member("link", name)
        elif kind in b"VDN" or name.endswith(b"/"):
            pass  # a label, a directory
        elif kind == b"M":
            yield Member("other", name)  # the rest of a file that another volume begins
        else:
            yield Member("file", name, body, size)
        at = body + -(-size // BLOCK) * BLOCK
    if not ended:
        yield Member("truncated")


def _header(block: bytes) -> tuple[bytes, int, bytes]:
    """Returns name, size and kind (b"0" for a plain file) of a header block."""
    spaces = 8 * 32  # the sum counts its own field as blanks; ancient programs summed signed bytes
    total = sum(block[:148]) + spaces + sum(block[156:])
    if (stored := _whole(block[148:156])) != total:
        rest = block[:148] + block[156:]
        if stored != total - 256 * sum(b > 127 for b in rest):
            raise _Damaged
    name, kind = block[:100].split(b"\0", 1)[0], block[156:157]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    size = _whole(block[124:136], name=b"" if kind in b"xgXLK" else name)
    return name, size, b"0" if kind == b"\0" else kind


def _whole(field: bytes, base: int = 8, *, name: bytes = b"") -> int:
    """Returns a number of a header, 0 or more: digits, or GNU's bytes after \\x80."""
    if base == 8 and field[:1] in (b"\x80", b"\xff"):
        found = int.from_bytes(field[1:], "big") if field[:1] == b"\x80" else -1
    else:
        digits = field.split(b"\0", 1)[0].strip() or b"0"
        try:
            found = int(digits, base) if digits.isdigit() else -1
        except ValueError:
            found = -1
    if not 0 <= found < 2**62:
        raise _Damaged(name)
    return found


def _records(data: bytes) -> dict[bytes, bytes]:
    """Returns the records of a pax header: "length key=value\\n" …"""
    out, at = {}, 0
    while at < len(data) and data[at]:
        digits = data[at : at + 20].partition(b" ")[0]
        num = _whole(digits, 10)
        line = data[at + len(digits) + 1 : at + num]
        if not line.endswith(b"\n") or num <= len(digits):
            raise _Damaged
        key, _, value = line[:-1].partition(b"=")
        out[key] = value
        at += num
    return out
