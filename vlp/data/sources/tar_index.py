"""The index of tar shards: where each sample's members lie, built once per file and kept in the cache.

Links, devices and names that climb ("..", "/…") are counted and skipped, as is whatever else is no plain file.
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from vlp.core import check
from vlp.data import index as index_lib
from vlp.data import storage
from vlp.data.sources import fields as fields_lib
from vlp.data.sources.tar_members import Member, members

VERSION = 3
IMAGES = (
    "jpg jpeg png webp gif bmp tif tiff ppm pgm pbm pnm jp2 j2k avif jfif jpe dib apng img".split()
)
TEXTS = ("txt", "caption", "text")
SIDECARS = ("thumbs.db", "desktop.ini")  # and all whose name begins with a dot: of no sample
SIDE_FOLDERS = ("__MACOSX", "@eaDir")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


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
    "left_reason": "u1",  # index in `REASONS` of omitted members and samples
    "left_file_ends": "<i8",
}
REASONS = ("link", "unsafe_name", "sparse", "other", "no_image", "no_text", "truncated", "damaged",
           "trailing")  # fmt: skip


class _Samples:
    """Groups members, in their order, into samples; writes samples and omitted members."""

    def __init__(self, writer: index_lib.Writer, wanted: Wanted):
        self.writer, self.wanted = writer, wanted
        self.place = {n: i for i, n in enumerate(wanted.names)}
        self.key: str | None = None
        self.parts: dict[str, tuple[int, int]] = {}  # of the current sample
        self.sparse: set[str] = set()
        self.counts: collections.Counter = collections.Counter()
        self.seen: collections.Counter = (
            collections.Counter()
        )  # number of omitted members, by reason
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
        """Ends the current sample."""
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
