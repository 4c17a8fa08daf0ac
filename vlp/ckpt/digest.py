"""SHA-256 of a checkpoint's files, written before the checkpoint gets its final name.

Orbax restores flipped bits without an error, and lists a step whose files are missing. The digests reveal both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from vlp.core import paths

FILE = "digests.json"
COMMIT = "commit_success.txt"  # by Orbax, after all other files


def write(folder: paths.Path) -> None:
    """Writes the digest of every file in the folder's items (its subdirectories)."""
    names = [n for n in paths.files(folder) if "/" in n and not n.endswith(f"/{COMMIT}")]
    digests = {name: _sha256(folder / name) for name in names}
    paths.write(folder / FILE, (json.dumps(digests, indent=1) + "\n").encode())


def problem(folder: paths.Path, items: Sequence[str]) -> str:
    """Returns what is wrong with a checkpoint's files, or "". Without digests only checks that the items exist."""
    try:
        digests = json.loads(paths.read(folder / FILE))
    except FileNotFoundError:
        digests = {}
    except ValueError:
        return f"{FILE} is broken"
    for item in items:
        if not paths.is_dir(folder / item):
            return f"{item} is missing"
    for name, digest in digests.items():
        if not paths.is_file(folder / name):
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} was changed"
    return ""


def _sha256(path: paths.Path) -> str:
    digest = hashlib.sha256()
    for data in paths.chunks(path):
        digest.update(data)
    return digest.hexdigest()
