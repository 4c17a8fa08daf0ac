"""Paths of runs: a local folder or an address in a bucket (gs://, s3://), and what both can do.

`parse` returns a `pathlib.Path` or an etils `epath.Path`, which have the same methods for names. For contents use the
functions here: on a disk they rename and lock; on a store they write whole objects and repeat requests that fail.
A store has no folders and no rename: a folder exists as long as an object lies in it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from vlp.core import check, stores
from vlp.core.stores import is_remote

if TYPE_CHECKING:
    from etils import epath

    Path: TypeAlias = pathlib.Path | epath.Path
else:
    Path = os.PathLike

_CHUNK = 16 << 20  # bytes per request
_ADDRESS = re.compile(r"\s*([A-Za-z][\w+.-]*):/")
_ALIASES = {"gcs": "gs", "gc": "gs", "google": "gs", "s3a": "s3", "s3n": "s3", "aws": "s3"}


def parse(where: str, text: str | os.PathLike, absolute: bool = True) -> Path:
    """Returns the path that a text of the command line or a config names.

    Args:
        where: the option, for errors.
        text: a local path, gs://BUCKET/NAME or s3://BUCKET/NAME.
        absolute: whether a local path is made absolute.

    Raises:
        UserError: an address with another scheme, without a bucket or a name, with characters that a store's clients
            would read as a pattern, or of a store whose package is not installed.
    """
    text = os.fspath(text)
    expected = "a local folder, gs://BUCKET/NAME or s3://BUCKET/NAME"
    found = _ADDRESS.match(text)
    if found is None and not re.match(rf"({'|'.join(stores.SCHEMES)}):", text):
        return pathlib.Path(text).absolute() if absolute else pathlib.Path(text)
    scheme, _, name = text.partition("://")
    if scheme not in stores.SCHEMES or not name:
        word = (found.group(1) if found else text.partition(":")[0]).lower()
        near = difflib.get_close_matches(word, stores.SCHEMES, n=1, cutoff=0.5)
        near = [_ALIASES[word]] if word in _ALIASES else near
        do = f"did you mean '{near[0]}://'?" if near else "for a local folder write ./ before it"
        if word == "file":
            do = "write the path without file://"
        raise check.error(where, repr(text), expected, do)
    bucket, _, key = name.rstrip("/").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket) or not key:
        do = "name the bucket (small letters, digits, '-', '_', '.') and a folder in it"
        raise check.error(where, repr(text), f"{scheme}://BUCKET/NAME", do)
    if any(part in ("", ".", "..") for part in key.split("/")) or re.search(r"[][*?#\\{}]", key):
        do = "leave out empty parts, '.', '..' and the characters * ? # [ ] { } \\"
        raise check.error(where, repr(text), "a plain name in the bucket", do)
    stores.check_package(where, scheme)
    from etils import epath

    return epath.Path(f"{scheme}://{bucket}/{key}")


def of(path: str | os.PathLike) -> Path:
    """Returns a path of either kind from its text, without the checks of `parse`."""
    if not is_remote(path):
        return pathlib.Path(path)
    from etils import epath

    stores.check_package(os.fspath(path), os.fspath(path).partition("://")[0])
    return epath.Path(path)


def found_from(cwd: str, path: str) -> str:
    """Returns a path, a relative one as it is seen from the folder `cwd`, if there is such a file."""
    if not path or not cwd or is_remote(path):
        return path
    there = os.path.join(cwd, path)
    return there if os.path.exists(there) else path


# ---- reading


def read(path: str | os.PathLike) -> bytes:
    """Returns all bytes of a (small) file. Raises FileNotFoundError, OSError, Failed."""
    if not is_remote(path):
        return pathlib.Path(path).read_bytes()
    return _ask(path, "cat_file")


def chunks(path: str | os.PathLike, num_bytes: int = _CHUNK) -> Iterator[bytes]:
    """Yields the bytes of a file of any size."""
    if not is_remote(path):
        with open(path, "rb") as f:
            while data := f.read(num_bytes):
                yield data
        return
    total = size(path)
    for begin in range(0, total, num_bytes):
        stop = min(begin + num_bytes, total)

        data = _ask(path, "cat_file", start=begin, end=stop)
        if len(data) != stop - begin:
            raise check.Failed(
                f"{os.fspath(path)}: got {len(data)} bytes at {begin}, expected {stop - begin}; copy it again"
            )
        yield data


def size(path: str | os.PathLike) -> int:
    """Returns the bytes of a file. Raises FileNotFoundError."""
    if not is_remote(path):
        return os.path.getsize(path)
    return int(_ask(path, "size"))


def exists(path: str | os.PathLike) -> bool:
    """True for a file and for a folder."""
    if not is_remote(path):
        return os.path.exists(path)
    return _ask(path, "exists")


def is_file(path: str | os.PathLike) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    return _ask(path, "isfile")


def is_dir(path: str | os.PathLike) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    return _ask(path, "isdir")


def listing(path: str | os.PathLike) -> list[Path]:
    """Returns the sorted paths of the entries of a folder; [] if there is no such folder."""
    if not is_remote(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(pathlib.Path(path).iterdir())
        return []
    folder = of(path)
    own = os.fspath(path).partition("://")[2].rstrip("/")
    try:
        found = _ask(path, "ls", detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {n.rstrip("/").rsplit("/", 1)[-1] for n in found if n.rstrip("/") != own}
    return [folder / name for name in sorted(names)]


def files(folder: str | os.PathLike) -> dict[str, int]:
    """Returns {name relative to the folder: bytes} of every file below it, in order of names."""
    if not is_remote(folder):
        paths = (p for p in pathlib.Path(folder).rglob("*") if p.is_file())
        found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}
        return dict(sorted(found.items()))
    infos = _ask(folder, "find", detail=True)
    root = os.fspath(folder).partition("://")[2].rstrip("/")
    sizes = {k.removeprefix(f"{root}/"): int(v["size"]) for k, v in infos.items()}
    return dict(sorted((k, v) for k, v in sizes.items() if not k.endswith("/")))


def check_bucket(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError or PermissionError if the bucket of an address is not there or may not be listed."""
    with contextlib.suppress(NotADirectoryError):
        scheme, _, rest = os.fspath(path).partition("://")
        bucket = f"{scheme}://{rest.partition('/')[0]}"
        if not _ask(bucket, "exists"):
            raise FileNotFoundError(errno.ENOENT, "no such bucket", bucket)


# ---- writing


def make_dir(path: str | os.PathLike) -> None:
    """Makes a folder and its parents; a store needs none."""
    if not is_remote(path):
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a (small) file atomically: a reader finds the old bytes or the new ones."""
    if is_remote(path):
        _ask(path, "pipe_file", data)
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with named(path):
            partial.unlink(missing_ok=True)  # which might be a link
            partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def create(path: str | os.PathLike, data: bytes) -> bool:
    """Writes a file unless it exists; returns whether it did. Of several that call it at once, one gets True.

    `data` should hold something that no other caller writes: an answer may get lost after the store wrote it.
    """
    try:
        if is_remote(path):
            _ask(path, "pipe_file", data, mode="create")
        else:
            with open(path, "xb") as f:
                f.write(data)
    except FileExistsError:
        return is_remote(path) and read(path) == data
    return True


def remove(path: str | os.PathLike) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _ask(path, "rm_file")
        else:
            os.unlink(path)


def remove_tree(path: str | os.PathLike) -> None:
    """Removes a folder with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _ask(path, "rm", recursive=True)
        else:
            shutil.rmtree(path)


def copy(path: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a file of any size; the target appears when it is whole."""
    same = (
        is_remote(path)
        and os.fspath(path).partition("://")[0] == (os.fspath(target).partition("://")[0])
    )
    if same:  # within the store
        _ask(path, "cp_file", stores.open_fs(target)[1])
    elif is_remote(target):

        def once(fs: Any, inner: str) -> None:
            with fs.open(inner, "wb") as f:
                for data in chunks(path):
                    f.write(data)

        stores.retried(target, lambda: once(*stores.open_fs(target)), limit=False)
    else:
        target = pathlib.Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with named(target), partial.open("wb") as f:
            for data in chunks(path):
                f.write(data)
        os.replace(partial, target)


def rename_tree(path: Path, target: Path, last: str = "") -> None:
    """Renames a folder. On a store: copies every object, then removes the old ones.

    last: the name in the folder of the file that makes it count (a commit marker). It is copied after all other files
    and removed before them, so that neither folder counts while it is incomplete.
    """
    if not is_remote(path):
        pathlib.Path(path).rename(target)
        return
    names = sorted(files(path), key=lambda name: name == last)
    for name in names:
        copy(path / name, target / name)
    for name in reversed(names):
        remove(path / name)


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Adds the file's name to errors of writing inside (a full disk's lacks it)."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or os.fspath(path)
        raise


def _ask(path: str | os.PathLike, method: str, *args: Any, **options: Any) -> Any:
    """Calls a method of the file system, as `stores.call`; what it raises names the path, as a disk's errors do."""
    try:
        return stores.call(path, method, *args, **options)
    except (FileNotFoundError, PermissionError) as e:
        code = errno.ENOENT if isinstance(e, FileNotFoundError) else errno.EACCES
        raise OSError(code, os.strerror(code), os.fspath(path)) from None
