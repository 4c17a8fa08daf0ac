"""Orbax on stores: what it lacks on s3:// and asks too much for on gs://.

Orbax 0.12.8 writes a checkpoint's metadata to any epath, but its arrays only to local folders and gs:// ("Checkpoint
path should be absolute. Got s3:/…"). TensorStore, which writes them, has an S3 driver. `enable` gives Orbax's three
private functions that choose the driver a branch for s3://. A test saves and restores through it.

Before Orbax lists or removes checkpoints on gs://, it asks for the bucket's metadata, which the usual roles of a job
(Storage Object User, Storage Object Admin) may not read. `enable` takes such an answer as "not hierarchical".
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

log = logging.getLogger(__name__)
_SCHEME = "s3://"
# As Orbax chooses for gs:// itself: a step counts once its commit marker is there. S3 has no rename.
ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


@functools.cache
def enable() -> None:
    """Changes Orbax as above, once per process; it must be called before Orbax uses a store."""
    hierarchical = gcs_utils.is_hierarchical_namespace_enabled

    def is_hierarchical(path: Any) -> bool:
        try:
            return bool(hierarchical(path))
        except Exception as e:  # google.api_core's, or a package that is missing
            log.debug("%s: kind of bucket unknown (%s)", path, e)
            return False

    gcs_utils.is_hierarchical_namespace_enabled = is_hierarchical
    normal, chosen = tensorstore_utils._normalize_path, tensorstore_utils._use_gcs_driver
    spec = gcs_utils.get_kvstore_for_gcs

    def normalize(path: str) -> str:
        if path.startswith(_SCHEME):
            return _SCHEME + os.path.normpath(path.removeprefix(_SCHEME))
        return normal(path)

    def get_kvstore(path: str) -> dict[str, Any]:
        if not path.startswith(_SCHEME):
            return spec(path)
        bucket, _, key = path.removeprefix(_SCHEME).partition("/")
        return {"driver": "s3", "bucket": bucket, "path": key, **_client()}

    tensorstore_utils._normalize_path = normalize
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(_SCHEME) or chosen(path)
    gcs_utils.get_kvstore_for_gcs = get_kvstore


def _client() -> dict[str, Any]:
    """Settings that s3fs reads from the environment and TensorStore does not."""
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found = {k: next(filter(None, map(os.environ.get, v)), "") for k, v in names.items()}
    client: dict[str, Any] = {k: v for k, v in found.items() if v}
    if (
        "AWS_ACCESS_KEY_ID" in os.environ
    ):  # else it looks for files first, and prints an error for each missing one
        client["aws_credentials"] = {"type": "environment"}
    return client
