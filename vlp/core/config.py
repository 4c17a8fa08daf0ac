"""Configs: a Python file returns plain data; each section becomes the frozen dataclass of its component.

    config = load("configs/coca_emoji.py:smoke", ["optim.weight_decay=0.1"])
    optim = build(Optim, config["optim"], "config.optim")

Field names, types and defaults live once, with the code that uses them: `build` refuses an unknown key and names
the nearest known one, so a mistyped key dies here, before anything compiles. Inside `vlp` a config is plain nested
dicts, lists and scalars (JSON-able); `ml_collections.ConfigDict` is what config files are written with.
"""

import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flax.core import FrozenDict

from vlp.core import check, plugins

if typing.TYPE_CHECKING:  # imported where config files are read: a model can be built without it
    import ml_collections

T = TypeVar("T")
_loads = itertools.count()  # numbers the packages: each config file is loaded as a new one
_FLOAT32_MAX = 3.4028234663852886e38


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> "ml_collections.ConfigDict":
    """Parses a config file's argument, "size=base,smoke", into the types of `defaults`.

    A word without `=` is True (the key must be a bool). Raises UserError for an unknown key or a wrong type.
    """
    import ml_collections

    parsed = ml_collections.ConfigDict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, eq, text = part.partition("=")
        if key not in defaults:
            raise check.unknown("config argument", key, defaults)
        want = type(defaults[key])
        value = True if not eq else text if want is str else _literal(text)
        if want is float and type(value) is int:
            value = float(value)
        if type(value) is not want:
            do = f"write {key}=<{want.__name__}>"
            raise check.error(f"config argument {key}", repr(value), want.__name__, do)
        parsed[key] = value
    return parsed


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Loads "path/to/config.py:argument" and applies overrides "section.key=value".

    An override may set a key that the file leaves at its default; `build` checks its name and type.
    """
    path, _, arg = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise check.error(
            "--config", repr(path), "a Python file with get_config(arg)", _near(pathlib.Path(path))
        )
    returned, has_parts = _returned(path, arg)
    config = plain(returned)
    if not isinstance(config, dict):
        got, do = f"{config!r:.60} from get_config", "return an ml_collections.ConfigDict"
        raise check.error(f"--config {path}", got, "a config", do)
    override(config, overrides)
    for key in (item.partition("=")[0] for item in overrides):
        stages = config.get("stages")
        if not isinstance(stages, list) or not stages:
            continue
        if all(_replaces(stage, config, key.split(".")) for stage in stages):
            do = f"write --config.stages.0.{key}=… for the first"
            raise check.error(f"config.{key}", "a value that each stage replaces", "a stage's", do)
    found = plugins.resolve(config.get("plugins", []), pathlib.Path(path).parent)
    if has_parts:
        found = [plugins.of_file(path), *found]
    return config | ({"plugins": found} if found else {})


def _near(path: pathlib.Path) -> str:
    """Returns advice for a missing config file: the most similar name in the same folder."""
    files = {p.name: p for p in path.parent.glob("*.py")} if path.parent.is_dir() else {}
    if found := difflib.get_close_matches(f"{path.stem}.py", files, n=1, cutoff=0.6):
        return f"did you mean {str(files[found[0]])!r}?"
    return "check the path"


def _returned(path: str, arg: str) -> tuple[Any, bool]:
    """What the file's get_config(arg) returns, and whether the file defines parts (`plugins`).

    Raises UserError, with file and line, for whatever the file raises.
    """
    where, package = f"--config {path}", f"vlp_config_{next(_loads)}"
    try:
        with plugins.blamed(where, path, "a config"), plugins.importing_from(path):
            module = plugins.execute(path, package)
            function = getattr(module, "get_config", None)
            if not callable(function):
                got = "no get_config" if function is None else f"get_config = {function!r:.40}"
                raise check.error(where, got, "def get_config(arg)", "add the function")
            if inspect.signature(function).parameters:
                return function(arg or None), plugins.defines_parts(module)
            if arg:
                do = "write def get_config(arg), or drop the argument"
                raise check.error(where, f"the argument {arg!r} for get_config()", "none", do)
            return function(), plugins.defines_parts(module)
    finally:
        plugins.forget(package)  # the next load reads every file again


def plain(value: Any) -> Any:
    """Returns a deep copy with only dicts, lists and scalars, as after a JSON round trip."""
    if hasattr(value, "to_dict"):  # a ConfigDict
        value = value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {name: plain(getattr(value, name)) for name in _fields(type(value))}
        for key, f in _fields(type(value)).items():  # what was `named` keeps its name
            table = f.metadata.get("table", {})
            names = [name for name, c in table.items() if type(getattr(value, key)) is c]
            out[key] = {"name": names[0], **out[key]} if names else out[key]
        return out
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            do = "write it in UTF-8"
            raise check.error("config", ascii(value), "text that UTF-8 can hold", do) from None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise check.error(
        "config", f"a {type(value).__name__}", "plain data (dict, list, str, number)", "return data"
    )


def overlay(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with `patch` laid over it, dict by dict; a section that changes `name` is replaced whole."""
    out = copy.deepcopy(dict(base))
    for key, value in patch.items():
        old = out.get(key)
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name"))
        )
        if isinstance(old, dict) and isinstance(value, Mapping) and same_kind == old.get("name"):
            out[key] = overlay(old, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def named(table: Mapping[str, type], default: str, kind: str) -> Any:
    """A field of a dataclass whose section says by `name` which class of `table` it is.

    Args:
        table: classes by name.
        default: the name of a section that has none.
        kind: a class whose attribute `kind` is another one is refused.
    """
    return dataclasses.field(metadata={"table": table, "default": default, "kind": kind})


def build(
    cls: type[T], section: Any, where: str, more: Mapping[str, type] = types.MappingProxyType({})
) -> T:
    """Builds a dataclass from a section of a config.

    Args:
        cls: the dataclass.
        section: its fields by name.
        where: the section's path, for errors.
        more: further classes by name for the fields that are `named` (a plugin's).

    Raises:
        UserError: for an unknown or a missing key, or a value of the wrong type.
    """
    if not isinstance(section, Mapping):
        raise check.error(where, repr(section), f"a section of {cls.__name__}", "write a dict")
    fields = {name: f for name, f in _fields(cls).items() if f.init}
    hints = typing.get_type_hints(cls)
    for key in section:
        if key not in fields:
            raise check.unknown(where, key, fields)
    required = dataclasses.MISSING
    for name, f in fields.items():
        if name not in section and f.default is required and f.default_factory is required:
            raise check.error(
                where, "no value", f"{name}: {_name(hints[name])}", f"set {where}.{name}"
            )

    def value(key: str) -> Any:
        choice, given, here = fields[key].metadata, section[key], f"{where}.{key}"
        if "table" not in choice:
            return _convert(given, hints[key], here)
        table = {**choice["table"], **more}
        kind = choice["kind"]
        table = {name: c for name, c in table.items() if getattr(c, "kind", kind) == kind}
        is_built = isinstance(given, tuple(table.values()))
        return given if is_built else build_named(table, given, here, choice["default"])

    return cls(**{key: value(key) for key in section})


def build_named(
    table: Mapping[str, type],
    section: Any,
    where: str,
    default: str = "",
    more: Mapping[str, type] = types.MappingProxyType({}),
) -> Any:
    """Builds the component of `table` that `section["name"]` names (or `default`) from the rest of the section.

    Raises UserError for an unknown name, and as `build` (which says what `more` is).
    """
    if not isinstance(section, Mapping):
        do = (
            f"write {where}.name={section}"
            if section in list(table)
            else f"name one of {list(table)}"
        )
        raise check.error(where, repr(section), "a section", do)
    rest = dict(section)
    name = rest.pop("name", default)
    if not isinstance(name, str) or name not in table:
        raise check.unknown(f"{where}.name", str(name), table)
    return build(table[name], rest, where, more)


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists the paths at which two plain configs differ, as "path: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            d
            for k in keys
            for d in difference(old.get(k), new.get(k), f"{path}.{k}" if path else k)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            d for i, (a, b) in enumerate(zip(old, new)) for d in difference(a, b, f"{path}.{i}")
        ]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _fields(cls: Any) -> dict[str, dataclasses.Field]:
    """The fields that a config sets: all but those that flax adds to every module (`parent`, `name`)."""
    module = any(base.__module__ == "flax.linen.module" for base in cls.__mro__)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return {k: f for k, f in fields.items() if not (module and k in ("parent", "name"))}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def override(config: dict[str, Any], items: Sequence[str]) -> None:
    """Sets values of a plain config in place: "section.key=value". Raises UserError for a path that cannot be."""
    for item in items:
        _override(config, item)


def _override(config: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq:
        do = "write it with ="
        raise check.error(f"--config.{key}", "no value", f"--config.{key}=value", do)
    *parents, last = key.split(".")
    if not all((*parents, last)):
        raise check.error(
            f"--config.{key}",
            "an empty name",
            "section.key",
            "write names with one dot between them",
        )
    node: Any = config
    for i, part in enumerate(parents):
        where = "config" + "".join(f".{p}" for p in parents[:i])
        if isinstance(node, list):
            node = node[_index(part, node, where)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})  # a section that the file leaves at its defaults
        else:
            raise check.error(where, repr(node), "a section", "shorten the path")
    if isinstance(node, list):
        node[_index(last, node, "config." + ".".join(parents))] = _literal(text)
    elif isinstance(node, dict):
        node[last] = text if isinstance(node.get(last), str) else _literal(text)
    else:
        raise check.error(
            "config." + ".".join(parents), repr(node), "a section", "shorten the path"
        )


def _replaces(stage: Any, base: Any, path: Sequence[str]) -> bool:
    """Returns whether a stage's overlay replaces the base's whole value at a path."""
    for depth, part in enumerate(path):
        if not isinstance(stage, Mapping) or not isinstance(base, Mapping):
            return True
        if depth and stage.get("name", base.get("name")) != base.get("name"):
            return True  # a section of another kind
        same = {"steps", "samples"} if part in ("steps", "samples") else {part}
        if not same & stage.keys():
            return False
        stage, base = stage.get(part), base.get(part)
    return True


def _index(part: str, node: list, where: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise check.error(
            where, repr(part), f"a number below {len(node)}", "name an element of the list"
        )
    return int(part)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def _example(hint: Any) -> str:
    """Returns a value of a type, to show how one is written."""
    known = {
        bool: "True or False",
        int: "a whole number, as 8",
        float: "a number, as 0.1",
        str: "a text in quotes",
    }
    return known.get(hint, "a value of that type")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a plain value against a type hint; lists become tuples, sections become their dataclass."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(value, option, where)
            except check.UserError:
                continue
        return _convert(value, options[-1], where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(
                _convert(v, k, f"{where}.{i}") for i, (v, k) in enumerate(zip(value, kinds))
            )
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return FrozenDict({k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()})
    elif origin is typing.Literal and value in args:
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    elif type(value) is int and hint in (int, float) and abs(value) >= 2**53:
        raise check.error(where, value, "a number of less than 53 bits", "write a smaller one")
    elif hint is float and value != value:
        raise check.error(where, value, "a number", "write a finite number")
    elif hint is float and type(value) is float and _FLOAT32_MAX < abs(value) < math.inf:
        raise check.error(where, value, "a number that float32 holds", "write one below 3.4e38")
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    do = f"write {_example(hint)}"
    if isinstance(value, str) and value[:1] in ("(", "[", "{"):
        do = """on the command line write only literals, {"key": 1} for dict(key=1)"""
    raise check.error(where, repr(value), _name(hint) if origin is None else str(hint), do)
