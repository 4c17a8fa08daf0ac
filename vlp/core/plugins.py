"""Plugins: modules outside of the package whose dicts (TABLES: OBJECTIVES, MODELS …) extend those of `vlp`.

    config.plugins = ("my_parts",)        # a module that can be imported
    config.plugins = ("my_parts.py",)     # a file in the config's folder (or a path)

A config file that defines such dicts is a plugin itself. A checkpoint remembers the module's name, or the file's
absolute path and digest. Nothing is registered: `extended` returns a table with the parts of the plugins added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlp.core import check, flags

log = logging.getLogger(__name__)
TABLES = {
    "MODELS": "vlp.models",
    "TOWERS": "vlp.models",
    "HEADS": "vlp.models",
    "OBJECTIVES": "vlp.objectives",
    "EVALS": "vlp.evals",
    "LEAVES": "vlp.data.leaves",
}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A module by its name, or a file by its absolute path and the SHA-256 digest of its bytes."""

    module: str = ""
    file: str = ""
    sha256: str = ""


SHIPPED = str(pathlib.Path(__file__).parents[2] / "configs")  # there in a checkout
_plain: set[str] = (
    set()
)  # names in sys.modules that a user's file imported from beside it, without a dot
_open: list[str] = []  # the folders that `importing_from` is in, innermost last
_PACKAGE = r"vlp_(?:config|plugin)_\w+"  # what `execute` is given as package
_digests: dict[str, tuple[str, str]] = {}  # of plugins' files that ran: path and SHA-256, by module


def execute(path: str, package: str) -> types.ModuleType:
    """Runs a Python file with any ending as a module of `package`; call it within `importing_from(path)`.

    In it, `from .common import x` imports common.py from its folder, or else from `vlp`'s configs/.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [folder, SHIPPED]
    name = module_name(path, package)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and type hints look for its names
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def module_name(path: str, package: str) -> str:
    stem = pathlib.Path(path).stem
    return f"{package}.{stem if stem.isidentifier() else 'file_' + _digest(path.encode())[:8]}"


def forget(package: str) -> None:
    """Removes a package of `execute` and its modules, so that later imports read the files again."""
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]


@contextlib.contextmanager
def importing_from(path: str) -> Iterator[None]:
    """Inside, `import common` finds common.py in the folder of a file, even if another common.py was imported."""
    folder = os.path.dirname(os.path.realpath(path))
    others = {name: sys.modules.pop(name) for name in _plain & sys.modules.keys()}
    before = set(sys.modules)
    sys.path.insert(0, folder)
    _open.append(folder)
    importlib.invalidate_caches()  # a file may be new
    try:
        yield
    finally:
        _open.pop()
        sys.path.remove(folder)
        new = sys.modules.keys() - before
        tops = {name for name in new if "." not in name and _lies_in(sys.modules[name], folder)}
        mine = {name for name in new if name.partition(".")[0] in tops}
        _plain.update(mine)
        if _open:  # a config that loads another config keeps its own modules
            for name in mine:
                del sys.modules[name]
            sys.modules.update(others)


def _lies_in(module: types.ModuleType, folder: str) -> bool:
    """Whether a module is a file of the folder, or a package whose directory is in it."""
    packages = list(getattr(module, "__path__", []))
    paths = packages or [getattr(module, "__file__", None) or ""]
    return any(os.path.dirname(os.path.realpath(p)) == folder for p in paths)


@contextlib.contextmanager
def blamed(where: str, path: str, expected: str) -> Iterator[None]:
    """Turns any exception of a user's file into a UserError with the line in that file."""
    try:
        yield
    except check.UserError:
        raise
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = getattr(e, "lineno", None) or (frames[-1].lineno if frames else 0)
        text = " ".join(str(e).split())[:160]
        found = re.search(rf"module named '{_PACKAGE}\.(\S+)'|name '(\w+)' from '{_PACKAGE}'", text)
        if isinstance(e, ImportError) and found:
            got = f"no module {found[1] or found[2]!r} in line {line}"
            do = "copy it into the file's folder, or correct the name"
            raise check.error(where, got, "one in its folder or in vlp's configs/", do) from e
        if isinstance(e, ModuleNotFoundError):
            got = f"no module {e.name!r} in line {line}"
            do = "correct the name, or install it"
            raise check.error(where, got, "one in the file's folder or installed", do) from e
        got = f"{type(e).__name__} ({re.sub(_PACKAGE, '', text)}) in line {line}"
        raise check.error(where, got, expected, "correct the file") from e


def resolve(entries: Any, folder: str | os.PathLike = ".") -> list[dict[str, str]]:
    """Returns `config.plugins` as a checkpoint keeps it: {"module": …} or {"file": …, "sha256": …}.

    folder: where relative files and modules are looked for first. Entries that are resolved stay as they are.
    Raises UserError if it is not a list of names, and for a missing file.
    """
    where = "config.plugins"
    if isinstance(entries, str) or not isinstance(entries, list | tuple):
        do = """write ("my_parts",)"""
        raise check.error(where, repr(entries)[:80], "a list of modules or .py files", do)
    return [_resolve(entry, pathlib.Path(folder), where) for entry in entries]


def _resolve(entry: Any, folder: pathlib.Path, where: str) -> dict[str, str]:
    known = {f.name for f in dataclasses.fields(Plugin)}
    if isinstance(entry, Mapping) and entry and entry.keys() <= known:
        return {k: str(v) for k, v in entry.items()}
    if not isinstance(entry, str) or not entry or "\0" in entry:
        do = "name a module or a .py file"
        raise check.error(where, repr(entry)[:80], "a module or a file", do)
    is_file = entry.endswith(".py") or "/" in entry
    names = [entry] if is_file else [f"{entry}.py", f"{entry}/__init__.py"]
    for path in (base / name for base in (folder, pathlib.Path()) for name in names):
        if os.path.isfile(path):
            return of_file(path)
    if is_file:
        raise check.error(where, repr(entry), "a file in the config's folder", "check the path")
    if not all(part.isidentifier() for part in entry.split(".")):
        raise check.error(
            where,
            repr(entry),
            "a module's name or a .py file",
            "write it as an import does, as 'my_parts'",
        )
    return {"module": entry}


def of_file(path: str | os.PathLike) -> dict[str, str]:
    """The resolved entry of a file."""
    data = pathlib.Path(path).read_bytes()
    return {"file": os.path.abspath(path), "sha256": _digest(data)}


def defines_parts(module: types.ModuleType) -> bool:
    """True if a module has one of the dicts itself, and not by import from `vlp`."""
    return any(_own(module, name) for name in TABLES)


def _own(module: types.ModuleType, name: str) -> dict[str, Any]:
    table = getattr(module, name, None)
    ours = getattr(sys.modules.get(TABLES[name]), name, None)
    return table if isinstance(table, dict) and table is not ours else {}


def extended(
    which: str, table: Mapping[str, Any], plugins: Sequence[Plugin], names: Sequence[str] = ("",)
) -> Mapping[str, Any]:
    """Returns a table of `vlp` (a name in TABLES) with the parts of the plugins added.

    names: what will be looked up; if the table has them all, no plugin is loaded ("" is never there).
    Raises UserError if a plugin is gone or broken, and for a name that is there already.
    """
    if not plugins or all(name in list(table) for name in names):
        return table
    out = dict(table)
    for plugin in plugins:
        for name, part in _own(_module(plugin), which).items():
            if out.get(name, part) is not part:
                where, got = f"plugin {plugin.file or plugin.module}", f"{which}[{name!r}]"
                raise check.error(where, got, "a name that is new", "rename it")
            if not (isinstance(name, str) and isinstance(part, type)):
                where, got = f"plugin {plugin.file or plugin.module}", f"{which}[{name!r}]"
                raise check.error(
                    where,
                    f"{got} = {part!r:.60}",
                    "a class by its name",
                    "give the class itself, as {'foo': Foo}",
                )
            if not dataclasses.is_dataclass(part):
                where, got = f"plugin {plugin.file or plugin.module}", f"{which}[{name!r}]"
                do = "decorate it with @dataclasses.dataclass(frozen=True)"
                raise check.error(where, f"{got}, {part.__name__}", "a dataclass", do)
            out[name] = part
    return out


def _module(plugin: Plugin) -> types.ModuleType:
    """Imports a plugin; flags of JAX that it changes are set back."""
    module = _imported(plugin)
    if "jax" in sys.modules:  # workers that read data need none
        flags.pin()
    return module


def _imported(plugin: Plugin) -> types.ModuleType:
    where = "config.plugins"
    if plugin.file:
        if not os.path.isfile(plugin.file):
            do = "bring it back"
            raise check.error(where, f"{plugin.file}, which is gone", "the run's plugin", do)
        found = of_file(plugin.file)["sha256"]
        if plugin.sha256 and found != plugin.sha256:
            log.warning("plugin %s: it has changed since it was recorded", plugin.file)
        return _of_file(plugin.file, found)
    with blamed(f"{where} {plugin.module!r}", "", "a module"):
        try:
            return importlib.import_module(plugin.module)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{plugin.module}.".startswith(f"{e.name}."):
                raise
            do = "install it, set PYTHONPATH, or name a .py file"
            got = f"no module {plugin.module!r}"
            raise check.error(where, got, "the plugin's module", do) from None


def _of_file(path: str, sha256: str) -> types.ModuleType:
    """Runs a plugin's file once, or again once it has changed; plugins of one folder import each other's modules."""
    folder = os.path.dirname(os.path.realpath(path))
    package = f"vlp_plugin_{_digest(folder.encode())[:8]}"
    name = module_name(path, package)
    if name in sys.modules and _digests.setdefault(name, (path, sha256)) == (path, sha256):
        return sys.modules[name]
    _digests[name] = path, sha256
    with blamed(f"plugin {path}", path, "a module"), importing_from(path):
        return execute(path, package)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
