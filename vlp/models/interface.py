"""The fields of a model: checked, and changed in all of its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlp.core import check

DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = {  # the largest of each: what is beyond would only fill the memory, or take hours to trace
    "depth": 2**10, "heads": 2**12, "patch": 2**12, "vocab": 2**24, "width": 2**17,
}  # fmt: skip
_COUNTS = {"embed": 2**17, "mlp": 2**19, "queries": 2**16, "registers": 2**12}  # may be 0


def check_fields(module: Any, where: str) -> None:
    """Raises UserError for a size, rate, scale or dtype that cannot be, in a model or in one of its parts."""
    for field in dataclasses.fields(module):
        name = f"{where}.{field.name}"
        value: Any = getattr(module, field.name)
        if field.name in ("parent", "name"):
            continue
        if isinstance(value, Mapping):  # heads
            for key, part in value.items():
                check_fields(part, f"{name}.{key}")
        elif dataclasses.is_dataclass(value):
            check_fields(value, name)
        elif field.name in _SIZES and isinstance(value, int) and value < 1:
            raise check.error(name, value, "1 or more", "write 1 or more")
        elif field.name in _COUNTS and isinstance(value, int) and value < 0:
            raise check.error(name, value, "at least 0", "write 0 or more")
        elif isinstance(value, int) and value > (_SIZES | _COUNTS).get(field.name, value):
            most = (_SIZES | _COUNTS)[field.name]
            raise check.error(name, value, f"at most {most:,}", f"write {most:,} or less")
        elif field.name in ("dropout", "drop_path") and not 0 <= (value or 0) < 1:
            raise check.error(name, value, "in [0, 1)", "write a fraction below 1")
        elif field.name == "scale" and isinstance(value, float) and not 0 < value < math.inf:
            raise check.error(
                name, value, "above 0: the factor of the logits", "write a positive number"
            )
        elif field.name in ("mean", "std") and isinstance(value, tuple):
            if len(value) != 3 or (field.name == "std" and min(value) <= 0):
                expected = "a number of each colour" + ", above 0" * (field.name == "std")
                raise check.error(
                    name,
                    value,
                    expected,
                    "write three numbers" + ", each above 0" * (field.name == "std"),
                )
        elif field.name == "dtype" and value not in DTYPES:
            raise check.unknown(name, str(value), DTYPES)


def with_fields(module: Any, **values: Any) -> Any:
    """The model with these fields changed wherever a part of it has them (remat, scan, dtype)."""
    changes = {k: v for k, v in values.items() if hasattr(module, k)}
    for field in dataclasses.fields(module):
        part = getattr(module, field.name)
        if isinstance(part, Mapping):  # heads
            parts = {key: with_fields(value, **values) for key, value in part.items()}
            like: Any = type(part)
            changes[field.name] = like(parts)
        elif field.name not in ("parent", "name") and dataclasses.is_dataclass(part):
            changes[field.name] = with_fields(part, **values)
    return dataclasses.replace(module, **changes)
