"""WebDataset and img2dataset tar shards as random access, through an index built once per file.

A sample is a run of members that share the path up to the first dot of the file name. Nothing is
ever extracted, and a name is never used as a path: links, devices and names that climb ("..", "/…")
are counted and skipped. Not here: compressed tars (no random access) and downloading (img2dataset).
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Sequence

import msgpack
import numpy as np

from vlp.core import check
from vlp.data import reads
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import parquet

VERSION = 2
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img")
TEXTS = ("txt", "caption", "text")
log = logging.getLogger(__name__)


def split_name(name: str) -> tuple[str, str]:
    """Returns (key, extension): "a/b.seg.png" → ("a/b", "seg.png"), as webdataset groups."""
    directory, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{directory}/{stem}" if directory else stem), extension.lower()


def build_index(path: str) -> dict:
    """Returns {samples: [[key, {extension: [offset, size]}], …], left_out: [[reason, name], …]}.

    left_out: members (link or device, unsafe_name), samples (no_image, no_text), and truncated: the
    sample where an unfinished file ends ("" if between two), as the last sample of a file without
    its end mark is never trusted.
    """
    left_out: list[list[str]] = []
    groups: list[tuple[str, dict[str, list[int]]]] = []
    end, cut, begun = 0, False, None
    with reads.File(path) as file:
        total = reads.size(path)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    stop = member.offset_data + (member.size if member.isreg() else 0)
                    if stop > total:
                        # a body cut short: the sample before it is whole if another begins here
                        cut, begun = True, split_name(member.name)[0]
                        break
                    end = -(-stop // 512) * 512
                    if not member.isreg():
                        left_out += [["link", member.name]] * (not member.isdir())
                    elif member.name.startswith("/") or ".." in member.name.split("/"):
                        left_out.append(["unsafe_name", member.name])
                    else:
                        key, extension = split_name(member.name)
                        if not groups or groups[-1][0] != key:
                            groups.append((key, {}))
                        groups[-1][1][extension] = [member.offset_data, member.size]
        except tarfile.ReadError as e:
            if not groups and not total:
                raise check.error(path, "0 bytes", "a tar file", "remove it") from None
            if not groups:
                raise check.error(
                    path, f"no tar ({e})", "an uncompressed tar", "unpack or remove it"
                ) from None
            cut = True
    marked = total >= end + 512 and not any(reads.read(path, end, 512))
    if cut or not marked:
        if groups and begun in (None, groups[-1][0]):
            begun = groups.pop()[0]
        left_out.append(["truncated", begun or ""])
    samples = []
    for key, members in groups:
        if not any(m in IMAGES for m in members):
            left_out.append(["no_image", key])
        elif not any(m in (*TEXTS, "json") for m in members):
            left_out.append(["no_text", key])
        else:
            samples.append([key, members])
    return {"samples": samples, "left_out": left_out}


def index(path: str) -> dict:
    """Returns `build_index(path)`, kept in the cache until the tar changes."""
    path = path if reads.is_remote(path) else os.path.abspath(path)
    stamp = f"{VERSION}:{path}:{reads.stamp(path)}"
    name = hashlib.sha256(stamp.encode()).hexdigest()[:32]
    file = os.path.join(reads.cache_dir("tar-index"), name)
    if os.path.isfile(file):
        with open(file, "rb") as f:
            data = f.read()
        if data[:32] == hashlib.sha256(data[32:]).digest():
            return msgpack.unpackb(data[32:], raw=False)
        log.warning("%s: damaged index of %s; built again", file, path)
    found = build_index(path)
    data = msgpack.packb(found, use_bin_type=True)
    assert data is not None
    os.makedirs(os.path.dirname(file), exist_ok=True)
    part = f"{file}.{os.getpid()}"
    with open(part, "wb") as f:
        f.write(hashlib.sha256(data).digest() + data)
    os.replace(part, file)
    return found


def img2dataset_counts(files: Sequence[str]) -> dict[str, int]:
    """Sums img2dataset's `_stats.json` beside the tars: rows by status, and tars without one.

    {"success": …, "<cause of failure>": …, "unfinished_shards": …}; {} if it wrote none of them.
    """
    out: collections.Counter = collections.Counter()
    beside = set().union(*(reads.listing(os.path.dirname(f)) for f in {*files}))
    stats = {f: f"{f.removesuffix('.tar')}_stats.json" for f in files}
    if not any(s in beside for s in stats.values()):
        return {}
    for file in stats.values():
        if file not in beside:
            out["unfinished_shards"] += 1
            continue
        try:
            for cause, num in json.loads(reads.whole(file)).get("status_dict", {}).items():
                out[_cause(cause)] += num
        except ValueError:
            out["unfinished_shards"] += 1
    return dict(out)


def img2dataset_failures(files: Sequence[str], key: str = "") -> list[dict]:
    """Returns {key, reason} of every row that img2dataset could not fetch, from its Parquet.

    key: a column that it was asked to keep (`save_additional_columns`); "" = its own numbers.
    """
    key = key or "key"
    out = []
    for file in files:
        sidecar = f"{file.removesuffix('.tar')}.parquet"
        if not reads.exists(sidecar):
            continue
        table = parquet.open_file(sidecar)
        if {key, "status", "error_message"} <= set(table.schema_arrow.names):
            rows = table.read([key, "status", "error_message"]).to_pylist()
            out += [
                {"key": str(r[key]), "reason": _cause(r["error_message"] or r["status"])}
                for r in rows
                if r["status"] != "success"
            ]
    return out


def _count(left_out: Iterable[Sequence[str]]) -> dict[str, int]:
    return dict(collections.Counter(reason for reason, _ in left_out))


def _cause(message: str) -> str:
    """One line, without the byte counts that would make every truncated body a cause of its own."""
    line = " ".join(message.split())[:80]
    return re.sub(r"\d+ bytes read, \d+ more", "n bytes read, m more", line)


class TarSource:
    """The samples of tar files, in the order of `files`: a `records.Source`, picklable."""

    def __init__(
        self,
        files: Sequence[str],
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        strict: bool = False,
        tokenizer: str = "",
    ):
        self.files, self.fields, self.strict = tuple(files), fields, strict
        self._tokenizer = tokenizer
        guess = () if "captions" in fields.off else (*TEXTS, *fields_lib.CAPTION)
        self._columns = tuple(dict.fromkeys(fields.captions or guess))
        self._indices = [index(f) for f in self.files]
        self.counts = _count(entry for x in self._indices for entry in x["left_out"])
        self._check()
        self._ends = np.cumsum([len(x["samples"]) for x in self._indices]).tolist()
        keys = hashlib.sha256(b"tar\0")
        for found in self._indices:
            for key, members in found["samples"]:
                sizes = [[name, size] for name, (_, size) in sorted(members.items())]
                keys.update(f"{key}:{sizes}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = keys.hexdigest()

    def __reduce__(self):
        make = functools.partial(
            TarSource, fields=self.fields, strict=self.strict, tokenizer=self._tokenizer
        )
        return make, (self.files,)

    def _check(self) -> None:
        for file, found in zip(self.files, self._indices):
            if self.strict and found["left_out"]:
                counts = _count(found["left_out"])
                raise check.error(
                    file,
                    f"{counts} beside {len(found['samples'])} good samples",
                    "a whole tar",
                    "fetch it again, or read it without strict mode",
                )
        if self.counts:
            damaged = [f for f, x in zip(self.files, self._indices) if x["left_out"]]
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            where = f"{', '.join(damaged[:3])}{more}"
            log.warning("left out of tars, by reason: %s (%s)", self.counts, where)
        if not any(x["samples"] for x in self._indices):
            raise check.error(
                f"{list(self.files)!s:.120}",
                f"no sample with an image and a text ({self.counts})",
                "at least one",
                "check the files",
            )

    @property
    def left_out(self) -> list[dict[str, str]]:
        """Returns {file, key, reason} of every member or sample that is no record."""
        return [
            {"file": file.rsplit("/", 1)[-1], "key": name, "reason": reason}
            for file, found in zip(self.files, self._indices)
            for reason, name in found["left_out"]
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(map(reads.size, self.files))

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        samples = self._indices[shard]["samples"]
        key, members = samples[i - self._ends[shard] + len(samples)]
        # one ranged read for the whole sample: its members lie beside each other
        begin = min(o for o, _ in members.values())
        data = reads.read(self.files[shard], begin, max(o + n for o, n in members.values()) - begin)
        parts = {m: data[o - begin : o - begin + n] for m, (o, n) in members.items()}
        return self._record(key, parts)

    def place(self, i: int) -> dict:
        """Says what record i is: {row, file, key}."""
        shard = bisect.bisect_right(self._ends, i)
        samples = self._indices[shard]["samples"]
        key = samples[i - self._ends[shard] + len(samples)][0]
        return {"row": i, "file": self.files[shard].rsplit("/", 1)[-1], "key": key}

    def _record(self, key: str, parts: dict[str, bytes]) -> dict:
        image = next(parts[m] for m in IMAGES if m in parts)
        row: dict = {m: parts[m].decode("utf-8-sig") for m in TEXTS if m in parts}
        if "json" in parts:
            meta = json.loads(parts["json"])
            row = (meta if isinstance(meta, dict) else {}) | row
        if "cls" in parts:
            text = parts["cls"].decode("utf-8-sig").strip()
            row["cls"] = int(text) if text.isdecimal() else text
        fields = self.fields
        first = lambda part, names: (
            getattr(fields, part)
            or ("" if part in fields.off else next((n for n in names if n in row), ""))
        )
        found = dataclasses.replace(
            fields,
            captions=self._columns,
            lang=first("lang", fields_lib.LANG),
            label=first("label", fields_lib.LABEL),
        )
        return {
            "key": fields_lib.key(row, fields.key, key, strict=True) if fields.key else key,
            "image": image,
            **fields_lib.parts(row, found, fields, fields_lib.Notes()),
        }

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return self.files

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the shards."""
        return tokenizers.load(self._tokenizer)
