"""SHA-256 of a checkpoint's files, written before the checkpoint gets its final name.

Orbax restores flipped bits without an error, and lists a step whose files are missing. The digests reveal both.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence

FILE = "digests.json"
_COMMIT = "commit_success.txt"  # by Orbax, after all other files


def write(folder: pathlib.Path) -> None:
    """Writes the digest of every file in the folder's items (its subdirectories)."""
    files = sorted(p for p in folder.glob("*/**/*") if p.is_file() and p.name != _COMMIT)
    digests = {p.relative_to(folder).as_posix(): _sha256(p) for p in files}
    (folder / FILE).write_text(json.dumps(digests, indent=1) + "\n")


def problem(folder: pathlib.Path, items: Sequence[str]) -> str:
    """Returns what is wrong with a checkpoint's files, or "". Without digests only checks that the items exist."""
    try:
        digests = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        digests = {}
    except ValueError:
        return f"{FILE} is broken"
    for item in items:
        if not (folder / item).is_dir():
            return f"{item} is missing"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} was changed"
    return ""


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
