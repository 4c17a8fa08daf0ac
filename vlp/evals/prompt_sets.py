"""Templates and class names of zero-shot classification: sets as files, and the ids of prompts.

A set is a text file of UTF-8, one entry a line. A template has "{}" (or CLIP_benchmark's "{c}") for the class. A class
is its name, or "value<TAB>name" where records store something else. Ours are in prompts/; OpenAI's are read from an
installed open_clip. Results carry the digest of the lines (`io.digest`).
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vlp.core import check
from vlp.data.tokenizer import Tokenizer
from vlp.evals import io as ios

SHIPPED = pathlib.Path(__file__).parent / "prompts"
OPEN_CLIP = {  # name of a set → what open_clip calls it
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "openai_simple": "SIMPLE_IMAGENET_TEMPLATES",
    "imagenet": "IMAGENET_CLASSNAMES",
}


def templates(name: str, where: str) -> tuple[str, ...]:
    """Returns the templates of a set, with "{}" for the class. Raises UserError for a line without."""
    found = tuple(line.strip().replace("{c}", "{}") for line in _lines(name, where))
    if wrong := [t for t in found if "{}" not in t]:
        raise check.error(where, repr(wrong[0]), "templates with {}", f"correct {name}")
    return found


def classes(name: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the values of a set's classes in records (() if the file does not say), and their names."""
    rows = [line.split("\t") for line in _lines(name, where)]
    width = {len(row) for row in rows}
    if width == {1}:
        return (), tuple(row[0].strip() for row in rows)
    if width != {2}:
        got = f"lines with {sorted(n - 1 for n in width)} tabs in {name}"
        raise check.error(where, got, "a name a line, or value<TAB>name on each", "correct it")
    return tuple(row[0].strip() for row in rows), tuple(row[1].strip() for row in rows)


def _lines(name: str, where: str) -> list[str]:
    """Returns the entries of a set: shipped, of open_clip, or a file."""
    if name in OPEN_CLIP:
        return _open_clip(name, where)
    shipped = SHIPPED / f"{name}.txt"
    if "/" not in name and shipped.is_file():
        return ios.lines_of(str(shipped), where)
    if not pathlib.Path(name).is_file():
        known = [*sorted(p.stem for p in SHIPPED.glob("*.txt")), *OPEN_CLIP]
        raise check.error(where, repr(name), f"a file, or one of {known}", "correct it")
    return ios.lines_of(name, where)


def _open_clip(name: str, where: str) -> list[str]:
    try:
        module: Any = importlib.import_module("open_clip")
    except ImportError as e:
        got, do = f"{name!r}, and no open_clip ({e!s:.60})", "pip install open_clip_torch"
        raise check.error(where, got, "open_clip, which has this set", do) from None
    found = getattr(module, OPEN_CLIP[name])
    return [entry("{}") if callable(entry) else entry for entry in found]


def prompts(phrase: str, given: Sequence[str]) -> list[str]:
    """The prompts of a class; an empty phrase leaves no double space."""
    return [" ".join(template.replace("{}", phrase).split()) for template in given]


def encoded(
    tokenizer: Tokenizer, phrase: str, template: str, length: int
) -> tuple[Int[np.ndarray, "L"], bool]:
    """A prompt's ids, and whether it was too long: then it loses words of the template, from its beginning up to the
    class, before it loses the class."""
    before, _, after = template.partition("{}")
    words = before.split(" ")  # the last one is next to the class
    text = phrase
    for dropped in range(len(words)):
        text = prompts(phrase, [" ".join(words[dropped:]) + "{}" + after])[0]
        if (tokenizer.encode(text, 2 * length)[length:] == tokenizer.pad_id).all():
            return tokenizer.encode(text, length), dropped > 0
    return tokenizer.encode(text, length), True
