"""Prepared TensorFlow Datasets as random access, without TensorFlow (`tfds.data_source`).

Images stay encoded. Reads datasets prepared in a random-access format (ArrayRecord, Parquet);
preparing one is TFDS's own job (`tfds build --file_format=array_record`). A dataset whose files
name classes other than TFDS's own is refused: TFDS would import them.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlp.core import check
from vlp.data import pictures, storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib

# classes of features that TFDS may import, and the messages in which it keeps their settings
_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.(?!\w*test\.)\w+\.\w+")
_NAME = re.compile(r"\w[\w.+\-]*")  # of a dataset or a split: part of its files' names
_PROTO = re.compile(r"tensorflow_datasets\.\w+")


class TfdsSource:
    """One split of the dataset prepared in `path`: a `records.Source`, picklable."""

    def __init__(
        self,
        path: str,
        split: str,
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        tokenizer: str = "",
    ):
        self.path, self.split, self._given, self._tokenizer = path, split, fields, tokenizer
        check_files(path)
        import tensorflow_datasets as tfds
        from google.protobuf import json_format

        try:
            builder: Any = tfds.builder_from_directory(path)
            _check_paths(path, builder.info.splits)
        except (ValueError, KeyError, TypeError, AttributeError, json_format.Error) as e:
            if isinstance(e, check.UserError):
                raise
            expected = "a dataset that TFDS can open"
            raise check.error(
                path, f"{type(e).__name__} ({e!s:.120})", expected, "prepare it again"
            ) from None
        name, bracket, part = split.partition("[")
        split = fields_lib.existing(name, builder.info.splits) + bracket + part
        if split.partition("[")[0] not in builder.info.splits:
            raise check.unknown(f"split of {path}", split, builder.info.splits)
        features = list(builder.info.features or {})
        self.fields = fields_lib.sniff(features, fields, where=path)
        if self.fields.image not in features:
            do = "name it with --image"
            raise check.error(path, f"features {features}", "one of images", do)
        as_stored: Any = tfds.decode.SkipDecoding
        skip: Any = {self.fields.image: as_stored()}
        try:
            self._rows = builder.as_data_source(split, decoders=skip)
        except NotImplementedError as e:
            raise check.error(
                path,
                f"file format {builder.info.file_format} ({e!s:.60})",
                "one with random access",
                "prepare it again with `tfds build --file_format=array_record`",
            ) from None
        found = self.fields
        asked = (found.key, found.lang, found.label, *found.captions)
        self._columns = {fields_lib.column(features, name) for name in asked if name}
        info = builder.info
        text = f"tfds:{info.full_name}:{split}:{len(self._rows)}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        make = functools.partial(TfdsSource, fields=self._given, tokenizer=self._tokenizer)
        return make, (self.path, self.split)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, i: int) -> dict:
        """Says where record i is: {row}, of the split."""
        return {"row": i}

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and what of its row was left out."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        notes, stored = fields_lib.Notes(), self._rows[i]
        row = {k: _plain(stored[k]) for k in self._columns}
        made, strict = f"{self.split}-{i:08d}", bool(self._given.key)
        key = fields_lib.key(row, self.fields.key, made, strict=strict, notes=notes)
        image = stored[self.fields.image]
        if not isinstance(image, bytes):
            detail = f"row {i}: feature {self.fields.image!r} is a {type(image).__name__}"
            raise pictures.BadImage("missing", detail, key)
        parts = fields_lib.parts(row, self.fields, self._given, notes)
        return {"key": key, "image": image, **parts}, notes

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return storage.listing(self.path)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer in the folder of the dataset."""
        return tokenizers.load(self._tokenizer)


def check_files(path: str) -> None:
    """Raises a `UserError` for JSON that would have TFDS import or read what is not its own."""
    for name in ("features.json", "dataset_info.json"):
        file = os.path.join(path, name)
        if not storage.exists(file):
            do = "prepare the dataset again with `tfds build`"
            raise check.error(file, "no file", "a prepared TFDS dataset", do)
        try:
            found = json.loads(storage.whole(file).decode())
        except (ValueError, RecursionError) as e:
            do = "prepare it again"
            raise check.error(file, f"broken JSON ({e!s:.80})", "TFDS's own", do) from None
        if not isinstance(found, dict):
            raise check.error(file, f"{found!r:.80}", "a JSON object", "prepare it again")
        names = [found.get("name", "")] if name == "dataset_info.json" else []
        if names:
            splits = found.get("splits")
            if not isinstance(splits, list) or not all(isinstance(x, dict) for x in splits):
                expected = "a list of objects"
                raise check.error(file, f"splits {splits!r:.80}", expected, "prepare it again")
            names += [x.get("name", "") for x in splits]
        for one in names:
            if not (isinstance(one, str) and _NAME.fullmatch(one)):
                expected = "letters, digits and any of _ . + -"
                raise check.error(
                    file, f"the name {one!r:.100}", expected, "rename it there, or prepare it again"
                )
        for kind, value in _named(found):
            own = {"class": _CLASS, "message": _PROTO}.get(kind)
            if own and not (isinstance(value, str) and own.fullmatch(value)):
                expected = "only features of tensorflow_datasets.core.features"
                do = "prepare it again with these, or write it as Parquet"
                raise check.error(file, f"the {kind} {value!r:.100}", expected, do)
            if kind == "path" and (
                not isinstance(value, str) or ".." in re.split(r"[/\\]", value) or value[:1] == "/"
            ):
                expected = "names within the dataset"
                do = "write a path without '..' and without a leading '/'"
                raise check.error(file, f"the path {value!r:.100}", expected, do)


def _check_paths(path: str, splits: Any) -> None:
    """Raises a `UserError` if a file of a split lies outside of the dataset's directory."""
    inside = os.path.abspath(path) + os.sep
    for name, split in splits.items():
        for file in split.filepaths if split.num_shards else ():
            if not os.path.abspath(str(file)).startswith(inside):
                got, expected = f"a file {str(file)!r:.100}", "files within the dataset"
                raise check.error(f"{path}: split {name!r}", got, expected, "prepare it again")


def _named(found: Any) -> Iterator[tuple[str, Any]]:
    """Yields (kind, value) of all that names a Python class, a message or a path, however deep.

    Protocol buffers' JSON knows two spellings of a field; old features lie in a string of JSON.
    """
    if isinstance(found, list):
        for element in found:
            yield from _named(element)
    if not isinstance(found, dict):
        return
    for name, value in found.items():
        if name in ("pythonClassName", "python_class_name"):
            yield "class", value
        elif name == "type" and "content" in found:
            yield "class", value
        elif name in ("proto_cls", "protoCls"):
            yield from [("message", value)] if value else []
        elif name in ("filepathTemplate", "filepath_template"):
            yield "path", value
        elif name == "json" and isinstance(value, str):
            try:
                yield from _named(json.loads(value))
            except (ValueError, RecursionError):
                yield "class", value  # what cannot be read cannot be trusted
        elif name == "features" and isinstance(value, dict):
            yield from (("path", feature) for feature in value)
        if isinstance(value, (dict, list)):
            yield from _named(value)


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as Python values."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
