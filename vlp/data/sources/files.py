"""A folder of images with text files of the same names: .txt, .caption, .text, .cls or .json.

Folders in it are read too; where no image has a text, they are its classes. An image that is not
there is a `BadImage`, like one that cannot be decoded. Not here: remote folders, tables (tables.py).
"""

import collections
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from vlp.core import check
from vlp.data import index, pictures, records
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import rows

EXTENSIONS = tuple(
    sorted(e for e, kind in Image.registered_extensions().items() if kind in pictures.FORMATS)
)
TEXTS = ("txt", "caption", "text")
SIDECARS = ("json", *TEXTS, "cls")
CACHED_FILES = (
    10_000  # smaller folders are not cached: reading them again is fast and keeps the cache small
)


class FolderSource:
    """The images under a folder in path order, with their text files.

    The key is the path without its ending; the fingerprint covers names, texts and the images'
    sizes. A .json counts with its caption fields. A text that is not UTF-8, or a .json that does
    not parse, is a bad row (ValueError). With `fields.image`, images are the files of that ending
    ("seg.png"); with `fields.captions`, texts those of these endings ("alt.txt") or fields of the
    .json. Linked folders are followed where they stay in `root` and were not read already.
    """

    def __init__(
        self,
        path: str,
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        root: str = "",
        tokenizer: str = "",
        found: tuple["Names | None", str, int] = (None, "", -1),
    ):
        self.path, self.fields, self._root, self._tokenizer = path, fields, root or path, tokenizer
        self.real_root = os.path.realpath(self._root)
        self.left_out: list[dict[str, str]] = []
        known, self.fingerprint, self._classes = found
        if known is not None:  # in a worker, by another process
            self.files = known
            return
        images, texts = [], False
        for directory, names in _walk(path, self.real_root, fields.allow_outside, self.left_out):
            inner, some = self._look(directory, names)
            images += inner
            texts = texts or some
        if not images:
            expected = f"files ending in {list(EXTENSIONS)}"
            counts = f" ({self.counts})" if self.left_out else ""
            raise check.error(path, f"no image{counts}", expected, "check the path")
        self.files = Names.of(sorted(images))
        del images
        self._classes = -1 if texts or "label" in fields.off else _class_level(self.files)
        if len(self.files) < CACHED_FILES:
            self.fingerprint = self._content()
            return
        kept = index.cached("folder-index", f"1:{self._stamp()}", self._write)
        self.files, self.fingerprint = Names(kept), kept.meta["fingerprint"]

    def _stamp(self) -> str:
        """Returns a digest of names, sizes and times of all files: no file is opened for it."""
        digest = hashlib.sha256(os.fsencode(os.path.abspath(self.path)))
        for file in self.inputs():
            try:
                found = os.stat(file)
                digest.update(
                    os.fsencode(file) + f"\0{found.st_size}:{found.st_mtime_ns}\0".encode()
                )
            except OSError:
                digest.update(os.fsencode(file) + b"\0missing\0")
        return digest.hexdigest()

    def _content(self) -> str:
        """Returns a digest of the names, the texts, and the images' sizes."""
        digest = hashlib.sha256(b"folder\0")
        for i, name in enumerate(self.files):
            image = os.path.join(self.path, name)
            size = os.path.getsize(image) if os.path.isfile(image) else -1
            digest.update(os.fsencode(name) + f"\0{size}\0".encode())
            for file in self._sidecars(i):
                try:
                    digest.update(hashlib.sha256(self._read(file)).digest())
                except check.UserError:
                    raise
                except ValueError:
                    digest.update(b"unreadable")
        return digest.hexdigest()

    def _write(self, path: str) -> None:
        """Writes the index of the folder."""
        with index.Writer(path, {}, lists=("name",)) as writer:
            for names in index.batched(self.files):
                writer.add_texts("name", [os.fsencode(n) for n in names])
            writer.finish({"fingerprint": self._content()})

    def __reduce__(self):
        found = (self.files, self.fingerprint, self._classes)
        make = functools.partial(
            FolderSource,
            fields=self.fields,
            root=self._root,
            tokenizer=self._tokenizer,
            found=found,
        )
        return make, (self.path,)

    def _look(self, directory: str, names: list[str]) -> tuple[list[str], bool]:
        """Returns the images of a directory and whether one has a text; lists what is neither."""
        wanted = f".{self.fields.image.lower()}" if self.fields.image else EXTENSIONS
        images = [n for n in names if n.lower().endswith(wanted)]
        stems, texts = {self._stem(n) for n in images}, False
        for name in sorted({*names} - {*images}):
            endings = [e for e in self._endings() if name.lower().endswith(f".{e.lower()}")]
            if any(name[: -len(e) - 1] in stems for e in endings):
                texts = True
                continue
            if name == records.TOKENIZER or self._is_sidecar(os.path.join(directory, name)):
                continue
            ending = os.path.splitext(name)[1].lower()
            reason = f"not read ({as_text(ending) or 'no ending'})"
            reason = "no image beside it" if endings else reason
            self.left_out.append({"file": as_text(os.path.join(directory, name)), "reason": reason})
        return [os.path.normpath(os.path.join(directory, n)) for n in images], texts

    def _is_sidecar(self, name: str) -> bool:
        """Returns whether a file is one of img2dataset's reports."""
        stem = next((e for e in ("_stats.json", ".parquet") if name.endswith(e)), "")
        return bool(stem) and os.path.isdir(os.path.join(self.path, name.removesuffix(stem)))

    def _endings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*SIDECARS, *self.fields.captions)))

    def _stem(self, name: str) -> str:
        ending = self.fields.image
        return name[: -len(ending) - 1] if ending else os.path.splitext(name)[0]

    def _sidecars(self, i: int) -> dict[str, str]:
        """Returns the text files of an image, {path: ending}."""
        stem, out = os.path.join(self.path, self._stem(self.files[i])), {}
        for ending in self._endings():
            paths = (f"{stem}.{e}" for e in dict.fromkeys((ending, ending.upper(), ending.lower())))
            if (file := next(filter(os.path.isfile, paths), "")) and file not in out:
                out[file] = ending
        return out

    def _read(self, path: str) -> bytes:
        allowed, where = self.fields.allow_outside, as_text(os.path.relpath(path, self.path))
        try:
            return rows.read_file(
                path, self.real_root, where=where, key=None, allow_outside=allowed
            )
        except pictures.BadImage as e:
            raise ValueError(f"{e!s:.200}") from None  # a text, no image

    @property
    def how(self) -> str:
        """The origin of the labels, if it is not a file."""
        return "classes=folders" if self._classes >= 0 else ""

    @property
    def counts(self) -> dict[str, int]:
        """Number of unread files, by reason."""
        return dict(sorted(collections.Counter(x["reason"] for x in self.left_out).items()))

    @property
    def shards(self) -> list[str]:
        """Returns what img2dataset would call its shards, whose _stats.json and .parquet lie beside
        the folders that it wrote."""
        found = {name.split(os.sep)[0] for name in self.files if os.sep in name}
        paths = (os.path.join(self.path, name) for name in sorted(found))
        return [f"{p}.tar" for p in paths if os.path.isfile(f"{p}.parquet")]

    def __len__(self) -> int:
        return len(self.files)

    def place(self, i: int) -> dict:
        """Returns the place of record i: {row, file}."""
        return {"row": i, "file": as_text(self.files[i])}

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and its omitted data."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        notes, given, name = fields_lib.Notes(), self.fields, self.files[i]
        row: dict = {}
        for file, ending in self._sidecars(i).items():
            what = as_text(os.path.basename(file))
            text = fields_lib.text(self._read(file), what).removeprefix("\ufeff")
            if ending == "json":
                meta = fields_lib.parsed(text, what)
                row = {**meta, **row} if isinstance(meta, dict) else row
            elif ending == "cls":
                text = text.strip()
                row["cls"] = int(text) if text.isdecimal() and len(text) < 19 else text
            else:
                row[ending] = text
        first = lambda part, names: (
            getattr(given, part)
            or ("" if part in given.off else next((n for n in names if n in row), ""))
        )
        names = given.captions or (() if "captions" in given.off else (*TEXTS, *fields_lib.CAPTION))
        found = fields_lib.Fields(
            captions=tuple(dict.fromkeys(names)),
            lang=first("lang", fields_lib.LANG),
            label=first("label", fields_lib.LABEL),
            default_lang=given.default_lang,
        )
        key = as_text(self._stem(name).replace(os.sep, "/"))
        if given.key:
            key = fields_lib.key(row, given.key, key, strict=True, notes=notes)
        record = {"key": key, **fields_lib.parts(row, found, given, notes)}
        folders = name.split(os.sep)[:-1]
        if "label" not in record and 0 <= self._classes < len(folders):
            record["label"] = as_text(folders[self._classes])
        record["image"] = rows.read_file(
            os.path.join(self.path, name),
            self.real_root,
            where=as_text(name),
            key=record["key"],
            allow_outside=given.allow_outside,
        )
        return record, notes

    def inputs(self) -> Iterator[str]:
        """Yields the paths of all files behind it."""
        for i, name in enumerate(self.files):
            yield from (os.path.join(self.path, name), *self._sidecars(i))

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies in the folder."""
        return tokenizers.load(self._tokenizer)


class Names(Sequence):
    """File names in an index or in two arrays, a tenth of the memory of a list of strings."""

    def __init__(self, found: index.Index | dict[str, np.ndarray]):
        self._found = found

    @staticmethod
    def of(names: Sequence[str]) -> "Names":
        """Holds these names in memory."""
        encoded = [os.fsencode(n) for n in names]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return Names({"name": np.frombuffer(b"".join(encoded), np.uint8), "name_ends": ends})

    def __len__(self) -> int:
        return len(self._found["name_ends"])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        ends = self._found["name_ends"]
        here = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        return os.fsdecode(self._found["name"][here].tobytes())


def has_images(path: str) -> bool:
    """True if an image lies anywhere under a directory; stops at the first."""
    walk = _walk(path, os.path.realpath(path), False, [])
    return any(n.lower().endswith(EXTENSIONS) for _, names in walk for n in names)


def _walk(
    path: str, root: str, allow_outside: bool, left_out: list[dict[str, str]]
) -> Iterator[tuple[str, list[str]]]:
    """Yields (directory relative to `path`, its files) of all that is not hidden.

    Links to folders come last, each if it stays in `root` and was not read already.
    """
    todo, links, seen = [""], collections.deque(), set()
    while todo or links:
        if todo:
            inner = todo.pop()
        else:
            inner = links.popleft()
            target = os.path.join(path, inner)
            why = ""
            if not allow_outside and not rows.is_inside(target, root):
                why = "a linked folder outside (--allow-outside follows it)"
            elif os.path.realpath(target) in seen:
                why = "a linked folder that was read already"
            if why:
                left_out.append({"file": as_text(inner), "reason": why})
                continue
        real = os.path.realpath(os.path.join(path, inner))
        if real in seen:
            continue
        seen.add(real)
        files = []
        try:
            with os.scandir(os.path.join(path, inner)) as entries:
                visible = (e for e in entries if not e.name.startswith("."))
                found = sorted(visible, key=lambda e: e.name)
        except PermissionError:
            left_out.append({"file": as_text(inner), "reason": "a folder without permission"})
            continue
        for entry in found:
            name = os.path.join(inner, entry.name)
            if not _is_dir(entry):
                files.append(entry.name)
            elif entry.is_symlink():
                links.append(name)
            else:
                todo.append(name)
        yield inner, files


def _class_level(names: Sequence[str]) -> int:
    """Returns the level at which folders are classes: the first where paths differ, or the last."""
    common = os.path.dirname(names[0]).split(os.sep) if os.sep in names[0] else []
    for name in names:
        folders = name.split(os.sep)[:-1]
        level = next((k for k, (a, b) in enumerate(zip(common, folders)) if a != b), len(folders))
        common = common[:level]
    only = all(len(name.split(os.sep)) - 1 == len(common) for name in names)
    return len(common) - only


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def as_text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
