"""Config files, their arguments and overrides, and how a section becomes a dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import ml_collections
import pytest

from vlp.core import config
from vlp.core.check import UserError


@dataclasses.dataclass(frozen=True)
class Tower:
    width: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] | None = None
    flag: bool = False
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    tower: Tower
    towers: tuple[Tower, ...] = ()
    by_name: Mapping[str, Tower] = dataclasses.field(default_factory=dict)
    anything: Any = None


class Net(nn.Module):
    width: int
    tower: Tower | None = None


FILE = """
import ml_collections
from beside import WIDTH
from vlp.core.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size="base", steps=10, lr=0.1, smoke=False)
    c = ml_collections.ConfigDict()
    c.tower = dict(width=WIDTH, kind="a")
    c.towers = [dict(width=1), dict(width=2)]
    c.arg = arg.to_dict()
    return c
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "recipe.py").write_text(FILE)
    return str(tmp_path / "recipe.py")


def refused(match, function, *args, **kwargs):
    """Asserts a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_argument_takes_the_types_of_its_defaults(path):
    parse = lambda arg: config.load(f"{path}:{arg}" if arg else path)["arg"]
    assert parse("") == {"size": "base", "steps": 10, "lr": 0.1, "smoke": False}
    assert parse("size=12,steps=5,lr=1,smoke") == {
        "size": "12",
        "steps": 5,
        "lr": 1.0,
        "smoke": True,
    }
    assert type(parse("lr=1")["lr"]) is float and parse("lr=1e-3")["lr"] == 1e-3
    assert parse("smoke=False")["smoke"] is False and parse("smoke=true")["smoke"] is True
    refused("config argument: got 'step', .*did you mean 'steps'", parse, "step=3")
    refused("steps: got 1.5, expected int; write steps=<int>", parse, "steps=1.5")
    refused("steps: got True, expected int", parse, "steps")
    refused("smoke: got 1, expected bool", parse, "smoke=1")


def test_files_that_are_no_configs_are_refused(tmp_path):
    refused("--config: got '.*absent.py'", config.load, str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    refused("no get_config", config.load, str(tmp_path / "empty.py"))
    (tmp_path / "code.py").write_text("def get_config(arg): return dict(f=len)\n")
    refused(
        "got a builtin_function_or_method, expected plain data",
        config.load,
        str(tmp_path / "code.py"),
    )


def test_overrides_set_values_by_path(path):
    load = lambda *items: config.load(path, items)
    assert load("tower.width=8")["tower"] == {"width": 8, "kind": "a"}
    assert load("towers.1.width=9")["towers"] == [{"width": 1}, {"width": 9}]
    assert load("tower.kind=7")["tower"]["kind"] == "7"  # a string stays one
    assert load("tower.pair=(1, 2.5)")["tower"]["pair"] == (1, 2.5)
    built = config.build(
        Tower, load("tower.rate=2")["tower"], "tower"
    )  # left at its default by the file
    assert built.rate == 2.0
    assert load("other.width=1")["other"] == {"width": 1}  # `build` knows which sections there are
    refused("config.towers: got '2', expected a number below 2", load, "towers.2.width=1")
    refused("config.towers: got 'x'", load, "towers.x=1")
    refused("config.tower.width: got 4, expected a section", load, "tower.width.x=1")
    refused("config.tower.width: got no value", load, "tower.width")
    refused(
        "got 'widht', .*did you mean 'width'",
        config.build,
        Tower,
        load("tower.widht=8")["tower"],
        "t",
    )


def test_overrides_that_every_stage_replaces(tmp_path):
    (tmp_path / "c.py").write_text(
        """
def get_config(arg):
    return dict(
        name="run", batch=8, steps=10, model=dict(width=1, depth=2), objective=dict(name="clip", keep_ratio=0.5),
        seed=1,
        stages=[dict(name="a", batch=4, steps=5, model=dict(depth=3), objective=dict(name="cap")),
                dict(name="b", batch=2, samples=64, objective=dict(name="clip", keep_ratio=1.0))],
    )
"""
    )
    load = lambda *items: config.load(str(tmp_path / "c.py"), items)
    for item in ("batch=16", "steps=3", "samples=3", "objective.keep_ratio=0.1"):
        name = item.partition("=")[0]
        refused(f"config.{name}: got a value that each stage replaces", load, item)
    for item in ("model.width=3", "model.depth=4", "seed=2", "eval.x=1"):
        load(item)  # reaches a stage, or what stages have none of
    assert load("stages.0.batch=16")["stages"][0]["batch"] == 16


def test_plain_is_json_and_a_copy():
    section = ml_collections.ConfigDict(dict(a=dict(b=(1, 2)), c=None))
    plain = config.plain(section)
    assert plain == {"a": {"b": [1, 2]}, "c": None}
    plain["a"]["b"].append(3)
    assert section.a.b == (1, 2)
    assert config.plain(Tower(3))["sizes"] == [1, 2]
    assert config.plain(Net(3)) == {"width": 3, "tower": None}  # without the fields that flax adds
    assert config.plain({1: [Tower(2)]})["1"][0]["width"] == 2


def test_an_overlay_replaces_sections_of_another_name():
    base = {"a": {"x": 1, "y": {"z": 2}}, "o": {"name": "clip", "keep_ratio": 0.5}, "l": [1, 2]}
    same = config.overlay(base, {"a": {"y": {"w": 3}}, "o": {"keep_ratio": 1.0}, "l": [3]})
    assert same == {
        "a": {"x": 1, "y": {"z": 2, "w": 3}},
        "o": {"name": "clip", "keep_ratio": 1.0},
        "l": [3],
    }
    assert config.overlay(base, {"o": {"name": "clip", "k": 1}})["o"]["keep_ratio"] == 0.5
    assert config.overlay(base, {"o": {"name": "cap"}})["o"] == {
        "name": "cap"
    }  # another kind: whole
    same["a"]["y"]["z"] = 9
    assert base["a"]["y"] == {"z": 2}


def test_build_converts_plain_data():
    section = {"width": 3, "rate": 1, "sizes": [4], "pair": [1, 2], "kind": "b", "note": "n"}
    tower = config.build(Tower, section, "tower")
    assert tower == Tower(3, 1.0, "b", (4,), (1.0, 2.0), False, "n")
    model = config.build(
        Model,
        {
            "tower": section,
            "towers": [{"width": 1}],
            "by_name": {"k": {"width": 2}},
            "anything": [1],
        },
        "model",
    )
    assert model.towers == (Tower(1),) and model.by_name["k"] == Tower(2) and model.anything == [1]
    assert hash(config.build(Model, {"tower": section, "by_name": {}}, "model")) is not None
    assert config.build(Net, {"width": 2, "tower": {"width": 1}}, "net").tower == Tower(1)
    assert config.build(Tower, {"width": 1, "pair": None, "note": None}, "t").pair is None


@pytest.mark.parametrize(
    "section, match",
    [
        ({"widht": 1}, r"^tower: got 'widht', expected one of \[.*\]; did you mean 'width'\?$"),
        ({}, "^tower: got no value, expected width: int; set tower.width$"),
        ({"width": "8"}, "^tower.width: got '8', expected int; write a whole number, as 8$"),
        ({"width": True}, "tower.width: got True, expected int"),
        ({"width": 8.0}, "tower.width: got 8.0, expected int"),
        ({"width": 1, "rate": "fast"}, "tower.rate: got 'fast', expected float"),
        ({"width": 1, "rate": True}, "tower.rate: got True, expected float"),
        ({"width": 1, "flag": 1}, "tower.flag: got 1, expected bool"),
        ({"width": 1, "kind": "c"}, "tower.kind: got 'c', expected .*Literal"),
        ({"width": 1, "sizes": [1, "x"]}, "tower.sizes.1: got 'x', expected int"),
        ({"width": 1, "sizes": 3}, "tower.sizes: got 3, expected tuple"),
        ({"width": 1, "pair": [1.0]}, r"tower.pair: got \[1.0\], expected tuple"),
        ([1], r"tower: got \[1\], expected a section of Tower"),
    ],
)
def test_build_refuses(section, match):
    refused(match, config.build, Tower, section, "tower")


def test_build_names_the_place_in_nested_sections():
    refused(r"^model.tower: got 'x'", config.build, Model, {"tower": {"width": 1, "x": 1}}, "model")
    nested = {"tower": {"width": 1}, "towers": [{"width": 1}, {"width": "2"}]}
    refused("^model.towers.1.width: got '2'", config.build, Model, nested, "model")
    nested = {"tower": {"width": 1}, "by_name": {"k": {"width": None}}}
    refused("^model.by_name.k.width: got None", config.build, Model, nested, "model")


def test_build_named_picks_the_component_by_its_name():
    table = {"tower": Tower, "net": Net}
    assert config.build_named(table, {"name": "tower", "width": 2}, "config.x") == Tower(2)
    assert config.build_named(table, {"width": 2}, "config.x", default="tower") == Tower(2)
    match = (
        r"^config.x.name: got 'towr', expected one of \['net', 'tower'\]; did you mean 'tower'\?$"
    )
    refused(match, config.build_named, table, {"name": "towr"}, "config.x")
    refused("config.x.name: got ''", config.build_named, table, {}, "config.x")


@dataclasses.dataclass(frozen=True)
class Circle:
    kind: ClassVar = "shape"
    radius: int = 1


@dataclasses.dataclass(frozen=True)
class Red:
    kind: ClassVar = "colour"


@dataclasses.dataclass(frozen=True)
class Picture:
    shape: Any = config.named({"circle": Circle, "red": Red}, "circle", kind="shape")


def test_a_field_whose_section_names_its_class():
    """Another kind of class is refused; a class from outside is found; what is built is plain data again."""

    @dataclasses.dataclass(frozen=True)
    class Square:
        side: int = 2

    picture = config.build(Picture, {"shape": {"radius": 3}}, "config")
    assert picture == Picture(Circle(3)) == config.build(Picture, config.plain(picture), "config")
    assert config.plain(picture) == {"shape": {"name": "circle", "radius": 3}}
    assert config.build(Picture, {"shape": Circle(4)}, "config").shape.radius == 4
    section = {"name": "p", "shape": {"name": "square"}}
    square = config.build_named({"p": Picture}, section, "config", more={"square": Square})
    assert square.shape == Square()
    with pytest.raises(
        UserError, match=r"config.shape.name: got 'red', expected one of \['circle'\]"
    ):
        config.build(Picture, {"shape": {"name": "red"}}, "config")
    match = "config.shape: got 'circle', expected a section; write config.shape.name=circle"
    with pytest.raises(UserError, match=match):
        config.build(Picture, {"shape": "circle"}, "config")


def test_difference_lists_paths():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    new = {"a": {"b": 2, "c": [1, 3]}, "e": [1]}
    assert config.difference(old, new) == [
        "a.b: 1 -> 2",
        "a.c.1: 2 -> 3",
        "d: 1 -> null",
        "e: null -> [1]",
    ]
    assert config.difference(old, old) == []
