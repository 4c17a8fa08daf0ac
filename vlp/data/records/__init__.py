"""Datasets on disk: ArrayRecord shards and a manifest.json that describes them.

format.py says what a record is; manifest.py what the manifest holds; write.py and read.py do that. Not here: other
formats (sources/), order, decoding, batching (dataset.py).
"""

from vlp.data.records.format import FIELDS, REQUIRED, decode, encode
from vlp.data.records.manifest import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    check_file,
    file_entry,
    read_manifest,
    write_manifest,
)
from vlp.data.records.read import RecordSource, Source, in_order, open_split
from vlp.data.records.write import refuse_foreign, write, write_shard

__all__ = [
    "FIELDS",
    "FORMAT",
    "MANIFEST",
    "REQUIRED",
    "TOKENIZER",
    "RecordSource",
    "Source",
    "check_file",
    "decode",
    "encode",
    "file_entry",
    "in_order",
    "open_split",
    "read_manifest",
    "refuse_foreign",
    "write",
    "write_manifest",
    "write_shard",
]
