"""The leaves of a batch: what an objective may read, and how each is made from a record.

`LEAVES` names them all. A leaf is a frozen dataclass with

    spec(data, batch) → {name: (shape, dtype)}     the leaf, and the companions that come with it (its mask, its boxes)
    fill(record, draws, row)                       writes one row of each: row[name] is a view of the batch's array

and optionally `each(data)` (its instances, one for every name in the config), `is_missing(record, data)` (whether a
record has nothing for it), `config` (the fields of `config.data` that make it) and `stage` ("text": made before the
image is decoded). `fill` writes its whole row, also where the record lacks the field. It draws from `draws`, under
names of its own, so that no leaf changes another's draws. Not here: the leaves themselves
(image_leaves.py, text_leaves.py, field_leaves.py), reading records (samples.py), batches (dataset.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlp.core import check, plugins
from vlp.data.config import Data
from vlp.data.draws import Draws, Row, Spec
from vlp.data.field_leaves import Label, Stored, Weight
from vlp.data.image_leaves import Boxes, Image, ImageBox, NegativeImages, Views
from vlp.data.text_leaves import NegativeTexts, Sentences, Text, TextSlot

READS = ("image", "text")  # what is made unless an objective says otherwise
ALWAYS: Spec = {"mask": ((), np.bool_), "index": ((2,), np.uint32), "record": ((2,), np.uint32)}


@runtime_checkable
class Leaf(Protocol):
    """See the module's docstring."""

    def spec(self, data: Data, batch: int) -> Spec: ...

    def fill(self, record: dict, draws: "Draws", row: Row) -> None: ...


# name → the leaf, or the family of leaves; one line for a new one, here or in a plugin's LEAVES
LEAVES: dict[str, Any] = {
    "image": Image,
    "image.box": ImageBox,
    "views": Views,
    "text": Text,
    "text.slot": TextSlot,
    "sentences": Sentences,
    "label": Label,
    "weight": Weight,
    "boxes": Boxes,
    "negatives.text": NegativeTexts,
    "negatives.image": NegativeImages,
    "stored": Stored,
}


def find(
    data: Data, reads: Iterable[str] = READS, added: Sequence[plugins.Plugin] = ()
) -> tuple[Leaf, ...]:
    """Returns the leaves that make what is read.

    Args:
      data: the config section.
      reads: names of leaves, or of their companions ("boxes.mask"); `ALWAYS` are made in any case.
      added: plugins with further LEAVES.

    Raises: `UserError` for a name that no leaf of this config makes, and for stored crops with augmentation.
    """
    known = _known(data, added)
    wanted = sorted({*reads} - ALWAYS.keys())
    for name in wanted:
        if name not in known:
            raise unknown(name, known, added)
    makers = list(dict.fromkeys(known.values()))
    leaves = tuple(leaf for leaf in makers if any(known[name] is leaf for name in wanted))
    if uses_stored_crops(data, leaves):
        for field in ("jitter", "randaugment", "translate_frac"):
            if value := getattr(data, field):
                got, do = f"{value} with stored arrays", "set it to 0"
                expected = "0: the teacher saw only the stored crops"
                raise check.error(f"config.data.{field}", got, expected, do)
    return leaves


def _known(data: Data, added: Sequence[plugins.Plugin]) -> dict[str, Leaf]:
    """Every name that this config can make, and its leaf."""
    out: dict[str, Leaf] = {}
    for cls in plugins.extended("LEAVES", LEAVES, added).values():
        for leaf in cls.each(data) if hasattr(cls, "each") else [cls()]:
            for name in leaf.spec(data, 1):
                if name in out or name in ALWAYS:
                    got = f"{name!r}, which {type(out.get(name)).__name__} makes"
                    do = "rename the leaf"
                    raise check.error(f"batch leaf {cls.__name__}", got, "a name that is new", do)
                out[name] = leaf
    return out


def unknown(
    name: str, known: Iterable[str], added: Sequence[plugins.Plugin] = ()
) -> check.UserError:
    """Returns (does not raise) the error for a leaf that is not made, with the config fields that would make it."""
    table = plugins.extended("LEAVES", LEAVES, added)
    near = [cls for key, cls in table.items() if key.split(".")[0] == name.split(".")[0]]
    fields = ", ".join(dict.fromkeys(x.config for x in near if getattr(x, "config", "")))
    do = f"set in config.data: {fields}" if fields else "name one of them in the objective's reads"
    do = check.did_you_mean(name, known, do)
    return check.error(f"batch leaf {name!r}", "no such leaf", f"one of {sorted(known)}", do)


def uses_stored_crops(data: Data, leaves: Iterable[Leaf]) -> bool:
    """Whether a leaf belongs to one of the record's own crops, which the image then shows."""
    return any(isinstance(x, Stored) and data.stored[x.name].of == "crop" for x in leaves)


def spec(
    data: Data,
    batch: int,
    reads: Iterable[str] = READS,
    added: Sequence[plugins.Plugin] = (),
) -> Spec:
    """Returns {name: (shape, dtype)} of a batch of `batch` rows; known without opening the data (arguments: `find`)."""
    out: Spec = {}
    for leaf in find(data, reads, added):
        out |= leaf.spec(data, batch)
    return out | {k: ((batch, *shape), dtype) for k, (shape, dtype) in ALWAYS.items()}


def of_stream(reads: Iterable[str], stream: str = "") -> tuple[str, ...]:
    """Returns what is read of a stream ("words/text" → "text"); names of the main one, "", have no slash."""
    own = (name.rpartition("/") for name in sorted(reads))
    return tuple(name for prefix, _, name in own if prefix == stream)


def in_order(leaves: Iterable[Leaf]) -> list[tuple[int, Leaf]]:
    """Returns (stage, leaf), what needs no pixels first: 2 for "text", 1 for "image" (`loader_stats.STAGES`)."""
    stages = [(2 if getattr(leaf, "stage", "image") == "text" else 1, leaf) for leaf in leaves]
    return sorted(stages, key=lambda x: -x[0])
