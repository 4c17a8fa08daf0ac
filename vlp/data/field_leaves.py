"""Leaves that are fields of a record as numbers: label, weight, a teacher's stored arrays."""

import dataclasses
from typing import ClassVar

import numpy as np

from vlp.data.config import Data
from vlp.data.draws import BadRecord, Draws, Row, Spec, bad_field


@dataclasses.dataclass(frozen=True)
class Label:
    """label i32[B]: the record's class, or its name's place in `classes`; -1 without. label.mask bool[B]."""

    config: ClassVar = "classes"
    stage: ClassVar = "text"

    def spec(self, data: Data, batch: int) -> Spec:
        return {"label": ((batch,), np.int32), "label.mask": ((batch,), np.bool_)}

    def is_missing(self, record: dict, data: Data) -> bool:
        return record.get("label") is None

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        missing = self.is_missing(record, draws.data)
        row["label"][...] = -1 if missing else _class_of(record, draws.data.classes)
        row["label.mask"][...] = not missing


def _class_of(record: dict, classes: tuple[str, ...]) -> int:
    label = record["label"]
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    whole = isinstance(label, int | np.integer) and not isinstance(label, bool)
    if whole and 0 <= int(label) < (len(classes) or 2**31):
        return int(label)
    numbers = f"0 … {len(classes) - 1}" if classes else "a number from 0 on"
    raise bad_field(record, "label", f"{numbers}, or one of config.data.classes")


@dataclasses.dataclass(frozen=True)
class Weight:
    """weight f32[B]: the record's weight in a loss, 1 where it has none."""

    config: ClassVar = ""
    stage: ClassVar = "text"

    def spec(self, data: Data, batch: int) -> Spec:
        return {"weight": ((batch,), np.float32)}

    def is_missing(self, record: dict, data: Data) -> bool:
        return record.get("weight") is None

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        weight = record.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < float("inf"):
            raise bad_field(record, "weight", "a finite number from 0 on")
        row["weight"][...] = weight


@dataclasses.dataclass(frozen=True)
class Stored:
    """stored.<teacher> f32[B …]: what a teacher gave for the record, stored in it; stored.<teacher>.mask bool[B].

    With of="crop", the array is that of one of the record's `crops`, which is drawn, and the leaf "image" shows that
    crop. Zeros where the record has none.
    """

    config: ClassVar = "stored"
    stage: ClassVar = "text"
    name: str

    @staticmethod
    def each(data: Data) -> "list[Stored]":
        return [Stored(name) for name in data.stored]

    def spec(self, data: Data, batch: int) -> Spec:
        leaf, shape = f"stored.{self.name}", data.stored[self.name].shape
        return {leaf: ((batch, *shape), np.float32), f"{leaf}.mask": ((batch,), np.bool_)}

    def is_missing(self, record: dict, data: Data) -> bool:
        found = record.get("embeddings")
        return not isinstance(found, dict) or self.name not in found

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        given, leaf = draws.data.stored[self.name], f"stored.{self.name}"
        missing = self.is_missing(record, draws.data)
        row[f"{leaf}.mask"][...] = not missing
        row[leaf][...] = 0
        if missing:
            return
        array, shape = np.asarray(record["embeddings"][self.name]), given.shape
        if given.of == "crop":
            if not record.get("crops"):
                do = "field crops: the augmentations that they were computed on"
                raise BadRecord("bad_field", f"embeddings {self.name!r}, expected also the {do}")
            shape = (len(record["crops"]), *shape)
        if array.shape != shape:
            where = f"embeddings {self.name!r} of shape {array.shape}"
            raise BadRecord("bad_field", f"{where}, expected {shape} (config.data.stored)")
        row[leaf][...] = array[draws.stored_number(record)] if given.of == "crop" else array
