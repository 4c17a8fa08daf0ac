"""Folders of a run that another library writes: event files, traces."""

from __future__ import annotations

import os
import pathlib
import tempfile

from vlp.core import paths


class Mirror:
    """A local folder to give to a library. For a folder in a store it is a temporary one, copied there by `push`."""

    def __init__(self, folder: paths.Path):
        self._folder, self._pushed = folder, dict[str, tuple[int, int]]()
        self._temporary = None
        if paths.is_remote(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="vlp-")
        self.local = pathlib.Path(folder)
        if self._temporary is not None:
            self.local = pathlib.Path(self._temporary.name) / folder.name
            self.local.mkdir()

    def push(self) -> None:
        """Copies files that changed since the last call. Raises OSError, Failed."""
        if self._temporary is None:
            return
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            name, info = path.relative_to(self.local).as_posix(), os.stat(path)
            stamp = info.st_size, info.st_mtime_ns
            if self._pushed.get(name) != stamp:
                paths.copy(path, self._folder / name)
                self._pushed[name] = stamp

    def close(self) -> None:
        if self._temporary is not None:
            self.push()
            self._temporary.cleanup()
