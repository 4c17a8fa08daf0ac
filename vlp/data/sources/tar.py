"""WebDataset and img2dataset tar shards as random access, through an index built once per file.

A sample is a run of members that share the path up to the first dot of the file name; what follows
the dot is the member's name. Nothing is ever extracted, and a name is never used as a path: links,
devices and names that climb ("..", "/…") are counted and skipped, as is whatever else is no plain
file. Headers are read here rather than by `tarfile`, which keeps every member in memory and follows
a negative size for ever. Not here: compressed tars (no random access), downloading (img2dataset).
"""

import collections
import dataclasses
import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import index as index_lib
from vlp.data import storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import parquet

VERSION = 3
IMAGES = (
    "jpg jpeg png webp gif bmp tif tiff ppm pgm pbm pnm jp2 j2k avif jfif jpe dib apng img".split()
)
TEXTS = ("txt", "caption", "text")
SIDECARS = ("thumbs.db", "desktop.ini")  # and all whose name begins with a dot: of no sample
SIDE_FOLDERS = ("__MACOSX", "@eaDir")
BLOCK = 512
LONGEST_NAME = 2**24  # bytes of a header's own records; what says more is damaged
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
log = logging.getLogger(__name__)


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


def split_name(name: str) -> tuple[str, str]:
    """Returns (key, member's name): "a/b.seg.png" → ("a/b", "seg.png"), as webdataset groups."""
    directory, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{directory}/{stem}" if directory else stem), extension.lower()


def _is_sidecar(name: str) -> bool:
    *folders, base = name.split("/")
    hidden = base.startswith(".") or base.lower() in SIDECARS
    return hidden or any(f in SIDE_FOLDERS for f in folders)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The members that records are made of, by name; the first image that a sample has is its image."""

    images: tuple[str, ...]
    texts: tuple[str, ...]  # captions as members
    labels: tuple[str, ...]  # which make a sample even of an image without a caption
    others: tuple[str, ...]
    dotted: bool  # where a plain image is missing, file names may have dots in them

    @staticmethod
    def of(fields: fields_lib.Fields) -> "Wanted":
        """What the fields ask for; names that they leave open are guessed."""
        low = lambda *names: tuple(dict.fromkeys(n.lower() for n in names if n))
        return Wanted(
            images=low(fields.image) or tuple(IMAGES),
            texts=low(*fields.captions) or (() if "captions" in fields.off else TEXTS),
            labels=low(fields.label)
            or (() if fields.captions or "label" in fields.off else fields_lib.LABEL),
            others=low("json", fields.key, *fields_lib.LABEL, fields.lang, *fields_lib.LANG),
            dotted=not fields.image and not fields.captions,
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All of them; an index holds their places here."""
        return tuple(dict.fromkeys((*self.images, *self.texts, *self.labels, *self.others)))


LISTS = ("file", "key", "left")
KINDS = {
    "sample_ends": "<i8",  # of each file: samples up to it
    "member_ends": "<i8",  # of each sample: members up to it
    "member_name": "<u2",  # place in meta["names"]
    "member_at": "<i8",
    "member_size": "<i8",
    "left_reason": "u1",  # place in `REASONS`, of what is left out
    "left_file_ends": "<i8",
}
REASONS = ("link", "unsafe_name", "sparse", "other", "no_image", "no_text", "truncated", "damaged",
           "trailing")  # fmt: skip


class _Samples:
    """Takes members in their order, writes samples and what is left out."""

    def __init__(self, writer: index_lib.Writer, wanted: Wanted):
        self.writer, self.wanted = writer, wanted
        self.place = {n: i for i, n in enumerate(wanted.names)}
        self.key: str | None = None
        self.parts: dict[str, tuple[int, int]] = {}  # of the sample at hand
        self.sparse: set[str] = set()
        self.counts: collections.Counter = collections.Counter()
        self.seen: collections.Counter = collections.Counter()  # members of what is left out
        self.digest = hashlib.sha256(b"tar\0")
        self._samples: list[tuple[bytes, list[tuple[int, int, int]]]] = []
        self._left: list[tuple[int, bytes]] = []
        self.num = 0

    def add(self, member: Member) -> None:
        name = member.name.decode("utf-8", "backslashreplace")
        if _is_sidecar(name):
            self.counts["sidecar"] += 1
        elif member.kind == "file" and (name.startswith("/") or ".." in name.split("/")):
            self.leave("unsafe_name", name)
        elif member.kind in ("link", "other"):
            self.leave(member.kind, name)
        else:
            key, extension = split_name(name)
            if key != self.key or extension in self.parts:
                self.close()
                self.key = key
            self.parts[extension] = (member.offset, member.size)
            if member.kind == "sparse":
                self.sparse.add(extension)

    def leave(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self._left.append((REASONS.index(reason), name.encode()))
        if len(self._left) >= 2**14:
            self.flush()

    def close(self) -> None:
        """Ends the sample at hand."""
        key, parts, sparse = self.key, self.parts, self.sparse
        self.key, self.parts, self.sparse = None, {}, set()
        if key is None:
            return
        wanted, samples = self.wanted, {key: {n: n for n in self.wanted.names if n in parts}}
        if wanted.dotted and not samples[key].keys() & {*wanted.images}:
            # no plain image: "a.01.02.jpg" beside "a.01.02.txt" may be a name with dots in it
            dotted = {n: n.rpartition(".")[::2] for n in parts if "." in n}
            if infixes := dict.fromkeys(i for i, n in dotted.values() if n in wanted.images):
                samples = {key if len(infixes) == 1 else f"{key}.{i}": {} for i in infixes}
                for infix, sample in zip(infixes, samples.values()):
                    sample |= {
                        n: m for m, (i, n) in dotted.items() if i == infix and n in self.place
                    }
        for name, found in samples.items():
            self._sample(name, found, parts, sparse)

    def _sample(self, key: str, found: dict[str, str], parts: dict, sparse: set[str]) -> None:
        """Takes in a sample; `found`: the wanted name of each member of use."""
        wanted = self.wanted
        images = [n for n in wanted.images if n in found]
        for name in images[1:]:
            del found[name]
        if sparse.intersection(found.values()):
            reason = "sparse"
        elif not images:
            reason = "no_image"
        elif not found.keys() & {*wanted.texts, *wanted.labels, "json"}:
            reason = "no_text"
        else:
            rows = sorted((self.place[n], *parts[m]) for n, m in found.items())
            self.digest.update(f"{key}:{[(wanted.names[n], s) for n, _, s in rows]}\0".encode())
            self._samples.append((key.encode(), rows))
            self.num += 1
            if len(self._samples) >= 2**14:
                self.flush()
            return
        self.leave(reason, key)
        if reason != "sparse" and len(self.seen) < 1000:
            self.seen.update(parts.keys())

    def flush(self) -> None:
        """Hands over to the writer what has gathered."""
        writer, samples = self.writer, self._samples
        writer.add_texts("key", [k for k, _ in samples])
        begin = writer.size("member_name")
        ends = np.cumsum([len(rows) for _, rows in samples], dtype=np.int64)
        writer.add("member_ends", begin + ends)
        flat = np.array([r for _, rows in samples for r in rows], np.int64).reshape(-1, 3)
        for column, name in enumerate(("member_name", "member_at", "member_size")):
            writer.add(name, flat[:, column])
        writer.add_texts("left", [name for _, name in self._left])
        writer.add("left_reason", [reason for reason, _ in self._left])
        self._samples, self._left = [], []


def build_index(path: str, file: str, wanted: Wanted) -> None:
    """Writes to `file` the index of the tar `path`.

    Left out of it, with a reason: members (link or device, unsafe_name), samples (no_image, no_text: neither a
    caption nor a class; sparse: a member with holes), and where a file stops: truncated (the sample there, "" if
    between two; without an end mark the last sample is never trusted), damaged or trailing (bytes that are no tar).
    Only counted: sidecars that other systems leave behind.
    """
    with index_lib.Writer(file, KINDS, lists=LISTS) as writer:
        samples, anything = _Samples(writer, wanted), False
        for member in members(path):
            if member.kind in ("file", "link", "sparse", "other"):
                anything = True
                samples.add(member)
                continue
            if member.kind == "end":
                anything = True
                samples.close()
                continue
            if not anything:
                raise _no_tar(path)
            if member.kind in ("truncated", "damaged"):
                # the sample before a body cut short is whole if another begins there
                begun = split_name(member.name.decode("utf-8", "backslashreplace"))[0]
                if begun and samples.key not in (None, begun):
                    samples.close()
                samples.leave("truncated", begun or samples.key or "")
                samples.key = None
            if member.kind != "truncated":
                samples.leave(member.kind, f"{member.size} bytes from {member.offset} on")
        samples.close()
        samples.flush()
        if not anything:
            raise _no_tar(path)
        writer.add_texts("file", [os.fsencode(path)])
        writer.add("sample_ends", [samples.num])
        writer.add("left_file_ends", [writer.size("left_reason")])
        writer.finish(
            {
                "fingerprint": samples.digest.hexdigest(),
                "counts": samples.counts,
                "names": wanted.names,
                "seen": dict(samples.seen.most_common(20)),
            }
        )


def _no_tar(path: str) -> check.UserError:
    if not storage.size(path):
        return check.error(path, "0 bytes", "a tar file", "remove it")
    begin = storage.read(path, 0, min(8, storage.size(path)))
    for magic, name in _PACKED.items():
        if begin.startswith(magic):
            got = f"{name} data, which has no random access"
            return check.error(path, got, "a plain tar", "unpack it first")
    do = "remove it or copy it again"
    return check.error(path, f"no tar (it begins with {begin!r})", "an uncompressed tar", do)


def stamp(path: str, wanted: Wanted) -> str:
    """Returns what changes when the tar does, or what is wanted of it."""
    return f"{VERSION}:{wanted}:{path}:{storage.stamp(path)}"


def index(files: Sequence[str], wanted: Wanted) -> index_lib.Index:
    """Returns the index of tars in their order, kept in the cache until one of them changes."""
    files = [f if storage.is_remote(f) else os.path.abspath(f) for f in files]
    stamps = [stamp(f, wanted) for f in files]

    def one(number: int) -> index_lib.Index:
        build = lambda out: build_index(files[number], out, wanted)
        return index_lib.cached("tar-index", stamps[number], build)

    if len(files) == 1:
        return one(0)
    text = "\n".join(stamps)
    joined = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    build = lambda out: _join(out, map(one, range(len(files))))
    return index_lib.cached("tar-index", joined, build)


def _join(out: str, parts: Iterator[index_lib.Index]) -> None:
    """Writes the indices of several tars as one."""
    digest, meta = hashlib.sha256(b"tars\0"), {}
    counts: collections.Counter = collections.Counter()
    seen: collections.Counter = collections.Counter()
    with index_lib.Writer(out, KINDS, lists=LISTS) as writer:
        samples = 0
        for part in parts:
            for name in LISTS:
                writer.add_list(name, part)
            members = writer.size("member_name")
            writer.add("sample_ends", part["sample_ends"] + samples)
            writer.add("member_ends", part["member_ends"] + members)
            writer.add("left_file_ends", part["left_file_ends"] + writer.size("left_reason"))
            for name in ("member_name", "member_at", "member_size", "left_reason"):
                writer.add(name, part[name])
            samples += len(part["member_ends"])
            meta = part.meta
            digest.update(meta["fingerprint"].encode())
            counts.update(meta["counts"])
            seen.update(meta["seen"])
        meta = meta | {"fingerprint": digest.hexdigest(), "counts": counts}
        writer.finish(meta | {"seen": dict(seen.most_common(20))})


def img2dataset_counts(files: Sequence[str]) -> dict[str, int]:
    """Sums img2dataset's `_stats.json` beside the tars: rows by status, and tars without one.

    {"success": …, "<cause of failure>": …, "unfinished_shards": …}; {} if it wrote none of them.
    """
    out: collections.Counter = collections.Counter()
    beside = set().union(*(storage.listing(os.path.dirname(f)) for f in {*files}))
    stats = {f: f"{f.removesuffix('.tar')}_stats.json" for f in files}
    if not any(s in beside for s in stats.values()):
        return {}
    for file in stats.values():
        if file not in beside:
            out["unfinished_shards"] += 1
            continue
        try:
            found = fields_lib.parsed(storage.whole(file), file)
        except ValueError:
            found = None
        counts = found.get("status_dict", {}) if isinstance(found, dict) else None
        if isinstance(counts, dict) and all(type(n) is int and n >= 0 for n in counts.values()):
            for cause, num in counts.items():
                out[_cause(cause)] += num
        else:
            out["unfinished_shards"] += 1
    return dict(out)


def img2dataset_failures(files: Sequence[str], key: str = "") -> Iterator[dict]:
    """Yields {key, reason} of every row that img2dataset could not fetch, from its Parquet.

    key: a column that it was asked to keep (`save_additional_columns`); "" = its own numbers.
    """
    key = key or "key"
    for file in files:
        sidecar = f"{file.removesuffix('.tar')}.parquet"
        if not storage.exists(sidecar):
            continue
        table = parquet.open_file(sidecar)
        if {key, "status", "error_message"} <= set(table.schema_arrow.names):
            for r in table.read([key, "status", "error_message"]).to_pylist():
                if r["status"] != "success":
                    reason = _cause(str(r["error_message"] or r["status"]))
                    yield {"key": str(r[key]), "reason": reason}


def _cause(message: str) -> str:
    """One line, without the byte counts that would make every truncated body a cause of its own."""
    line = " ".join(message.split())[:80]
    return re.sub(r"\d+ bytes read, \d+ more", "n bytes read, m more", line)


class TarSource:
    """The samples of tar files, in the order of `files`: a `records.Source`, picklable by its index.

    A sample has an image and a caption, a class or both; one of a class alone has no captions.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        strict: bool = False,
        tokenizer: str = "",
    ):
        found = index(files, Wanted.of(fields))
        self._open(found, fields, tokenizer)
        self._check(strict)

    def _open(self, found: index_lib.Index, fields: fields_lib.Fields, tokenizer: str) -> None:
        self._index, self.fields, self._tokenizer = found, fields, tokenizer
        self.fingerprint: str = found.meta["fingerprint"]
        self.counts: dict[str, int] = found.meta["counts"]
        self._names: list[str] = found.meta["names"]
        self._wanted = Wanted.of(fields)
        guess = () if "captions" in fields.off else (*TEXTS, *fields_lib.CAPTION)
        self._columns = tuple(dict.fromkeys(fields.captions or guess))

    def __reduce__(self):
        return _opened, (self._index, self.fields, self._tokenizer)

    def _check(self, strict: bool) -> None:
        counts = {k: n for k, n in self.counts.items() if k != "sidecar"}
        if counts and strict:
            number = int(np.argmax(self._index["left_file_ends"] > 0))
            first = collections.Counter(row["reason"] for row in self._left_out(number))
            good = self._index.part("sample_ends", number)
            got = f"{dict(first)} beside {good.stop - good.start} good samples"
            do = "fetch it again, or read it without strict mode"
            raise check.error(self._index.text("file", number), got, "a whole tar", do)
        if counts:
            ends = self._index["left_file_ends"]
            damaged = np.flatnonzero(np.diff(ends, prepend=0))
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            where = ", ".join(self._index.text("file", int(i)) for i in damaged[:3])
            log.warning("left out of tars, by reason: %s (%s%s)", counts, where, more)
        if not len(self):
            image = self.fields.image or "an image"
            text = f"one of {list(self.fields.captions)}" if self.fields.captions else "a caption"
            got, do = f"no sample with {image} and {text} ({counts})", "check the files"
            if seen := list(self._index.meta["seen"]):
                got += f"; members: {seen}"
                do = "name members with --image, --captions; put a sample's together (--sort=name)"
            where = ", ".join(self.files[:3]) + (" …" if len(self.files) > 3 else "")
            raise check.error(where, got, "at least one", do)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the tars."""
        return tuple(self._index.texts("file"))

    @property
    def left_out(self) -> Iterator[dict[str, str]]:
        """Yields {file, key, reason} of every member or sample that is no record."""
        for number in range(len(self._index["sample_ends"])):
            yield from self._left_out(number)

    def _left_out(self, number: int) -> Iterator[dict[str, str]]:
        file = self._index.text("file", number).rsplit("/", 1)[-1]
        here = self._index.part("left_file_ends", number)
        for i in range(here.start, here.stop):
            reason = REASONS[self._index["left_reason"][i]]
            yield {"file": file, "key": self._index.text("left", i), "reason": reason}

    def __len__(self) -> int:
        return len(self._index["member_ends"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(map(storage.size, self.files))

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and what of it was left out."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        found = self._index
        file = found.text("file", int(np.searchsorted(found["sample_ends"], i, side="right")))
        here = found.part("member_ends", i)
        names = [self._names[k] for k in found["member_name"][here].tolist()]
        at, sizes = found["member_at"][here].tolist(), found["member_size"][here].tolist()
        begin = min(at)
        stop = max(o + n for o, n in zip(at, sizes))
        # one ranged read for the whole sample, unless much lies between its members
        if stop - begin <= 2 * sum(sizes) + 2**16:
            data = storage.read(file, begin, stop - begin)
            parts = [data[o - begin : o - begin + n] for o, n in zip(at, sizes)]
        else:
            parts = [storage.read(file, o, n) for o, n in zip(at, sizes)]
        notes = fields_lib.Notes()
        return self._record(found.text("key", i), dict(zip(names, parts)), notes), notes

    def place(self, i: int) -> dict:
        """Says what record i is: {row, file, key}."""
        found = self._index
        file = found.text("file", int(np.searchsorted(found["sample_ends"], i, side="right")))
        return {"row": i, "file": file.rsplit("/", 1)[-1], "key": found.text("key", i)}

    def _record(self, key: str, parts: Mapping[str, bytes], notes: fields_lib.Notes) -> dict:
        given, wanted = self.fields, self._wanted
        image = next(parts[m] for m in wanted.images if m in parts)
        row: dict[str, Any] = {}
        if "json" in parts:
            meta = fields_lib.parsed(parts["json"], f"{key}.json")
            row = meta if isinstance(meta, dict) else {}
        names = (*self._columns, given.key, given.lang, given.label)
        for name in (*names, *fields_lib.LANG, *fields_lib.LABEL):
            if name.lower() in parts and name.lower() not in wanted.images:
                row[name] = parts[name.lower()].decode("utf-8-sig")
        first = lambda part, names: (
            getattr(given, part)
            or ("" if part in given.off else next((n for n in names if n in row), ""))
        )
        label = first("label", fields_lib.LABEL)
        if label.lower() in parts and label not in self._columns:
            text = row[label].strip()
            row[label] = int(text) if text.isdecimal() and len(text) < 19 else text
        found = dataclasses.replace(
            given,
            captions=self._columns,
            lang=first("lang", fields_lib.LANG),
            label=label,
        )
        if given.key:
            key = fields_lib.key(row, given.key, key, strict=True, notes=notes)
        return {"key": key, "image": image, **fields_lib.parts(row, found, given, notes)}

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return self.files

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the shards."""
        return tokenizers.load(self._tokenizer)


def _opened(found: index_lib.Index, fields: fields_lib.Fields, tokenizer: str) -> TarSource:
    source = TarSource.__new__(TarSource)
    source._open(found, fields, tokenizer)
    return source
