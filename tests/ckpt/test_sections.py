"""What a checkpoint keeps of a config: every field of every section, so that the run can be used again."""

import collections.abc
import dataclasses
import types
import typing

import numpy as np
from flax.core import FrozenDict

from vlp.ckpt.manager import Checkpoints
from vlp.core.config import build, plain
from vlp.core.mesh import MeshShape
from vlp.data.config import CaptionSource, Data, Part, Reweight
from vlp.evals import EVALS
from vlp.models import MODELS
from vlp.objectives import OBJECTIVES
from vlp.optim.make import Optim, Rule
from vlp.optim.schedules import Schedule
from vlp.train.guard import Spike
from vlp.train.stages import Keep, Run, Stream, Teacher

SECTIONS = [
    Data, Part, CaptionSource, Reweight, Optim, Rule, Schedule, Teacher, Stream, MeshShape, Run,
    *MODELS.values(), *OBJECTIVES.values(), *EVALS.values(),
]  # fmt: skip


def other(hint, default, seen):
    """A value of a type that is not the default; classes go into `seen`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if isinstance(default, tuple):  # points of a schedule: a number instead
            default = None
        return other(next(a for a in args if a is not type(None)), default, seen)
    if origin is typing.Literal:
        return next(a for a in args if a != default)
    if origin is tuple:
        return tuple(other(a, None, seen) for a in args if a is not Ellipsis)
    if origin in (dict, collections.abc.Mapping):
        return FrozenDict({"é": other(args[1], None, seen)})
    if dataclasses.is_dataclass(hint):
        return filled(hint, seen)
    if hint is bool:
        return not default
    if hint in (int, float):
        return hint(2**53 - 1) if hint is int else 1e-7 + (default or 0)
    assert hint in (str, typing.Any), hint
    return f"é{default}"


def filled(cls, seen):
    """An instance with every field set to something else than its default."""
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    module = any(base.__module__ == "flax.linen.module" for base in cls.__mro__)
    internal = ("parent", "name") if module else ()
    fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in internal]
    value = lambda f: None if f.default is dataclasses.MISSING else f.default
    out = {f.name: other(hints[f.name], value(f), seen) for f in fields if not f.metadata}
    for f in (f for f in fields if f.metadata):  # a class by name
        right = [c for c in f.metadata["table"].values() if c.kind == f.metadata["kind"]]
        out[f.name] = filled(right[0], seen)
    return cls(**out)


def test_every_field_of_every_section(tmp_path, monkeypatch):
    """Through a checkpoint and back unchanged."""
    seen = set()
    for cls in {*SECTIONS, Spike, Keep}:
        if not any(base.__module__ == "flax.linen.module" for base in cls.__mro__):
            monkeypatch.setattr(cls, "__post_init__", lambda self: None, raising=False)
    sections = [filled(cls, seen) for cls in SECTIONS]
    assert seen >= {*SECTIONS}
    meta = {"sections": [plain(section) for section in sections]}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": np.ones(1)}, {"step": np.ones(1)}, meta)
    checkpoints.close()
    back = Checkpoints(tmp_path / "checkpoints", create=False).meta(1)["sections"]
    for section, found in zip(sections, back, strict=True):
        cls = type(section)
        assert build(cls, found, cls.__name__) == section, cls.__name__
