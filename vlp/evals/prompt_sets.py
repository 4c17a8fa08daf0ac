"""Templates and class names of zero-shot classification: sets as files, and the ids of prompts.

A set is a text file of UTF-8, one entry a line. A template has "{}" (or CLIP_benchmark's "{c}") for the class. A class
is its name, or "value<TAB>name" where records store something else. Ours are in prompts/; OpenAI's are read from an
installed open_clip. Results carry the digest of the lines (`io.digest`).
"""

from __future__ import annotations

import importlib.util
import pathlib
import runpy
from collections.abc import Sequence

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
    """Returns a set of open_clip's zero_shot_metadata.py, which is run alone: open_clip itself would import torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        do = "pip install open_clip_torch"
        raise check.error(where, f"{name!r}, and no open_clip", "open_clip, which has this set", do)
    file = pathlib.Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    try:
        found = runpy.run_path(str(file))[OPEN_CLIP[name]]
    except (OSError, KeyError, ImportError) as e:
        got, do = f"{file} ({type(e).__name__}: {e!s:.60})", "install open_clip_torch 3"
        raise check.error(where, got, f"{OPEN_CLIP[name]} in it", do) from None
    return [str(entry("{}") if callable(entry) else entry) for entry in found]


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
