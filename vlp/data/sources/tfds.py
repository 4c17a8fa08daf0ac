"""Prepared TensorFlow Datasets as random access, without TensorFlow (`tfds.data_source`).

Images stay encoded. Reads datasets prepared in a random-access format (ArrayRecord, Parquet);
preparing one is TFDS's own job (`tfds build --file_format=array_record`).
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from vlp.core import check
from vlp.data import reads
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib


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
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(path)
        if split.split("[")[0] not in builder.info.splits:
            raise check.unknown(f"split of {path}", split, builder.info.splits)
        features = builder.info.features or {}
        self.fields = fields_lib.sniff(list(features), fields, where=path)
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
        info = builder.info
        text = f"tfds:{info.full_name}:{split}:{len(self._rows)}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        make = functools.partial(TfdsSource, fields=self._given, tokenizer=self._tokenizer)
        return make, (self.path, self.split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        row = {k: v if k == self.fields.image else _plain(v) for k, v in self._rows[i].items()}
        key = row.get(self.fields.key) if self.fields.key else f"{self.split}-{i:08d}"
        return {
            "key": key if isinstance(key, str) else str(key),
            "image": row[self.fields.image],
            "captions": fields_lib.captions(
                row, self.fields.captions, self.fields.lang, self.fields.default_lang
            ),
            **fields_lib.label(row, self.fields.label),
        }

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return reads.listing(self.path)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the dataset."""
        return tokenizers.load(self._tokenizer)


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as Python values, bytes as text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
