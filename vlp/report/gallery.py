"""What the run does, as data for pictures: retrieval with its best answers and as a heat map, captions beside images.

Images must be data URIs; others are left out, so that the page never asks the network. Ranks count from 1.
Artefacts may hold values of any type: what does not fit is left out.
"""

import difflib
import re
from typing import Any

import numpy as np
from markupsafe import Markup

from vlp.core import pages
from vlp.report import load, numbers, tables

MAX_ITEMS = 60
MAX_HEAT = 24
MAX_FOUND = 10  # answers to a query
MAX_TEXT = 500  # characters of a caption
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")


def retrieval(name: str, artefact: dict[str, Any]) -> dict[str, Any]:
    """Returns the queries of one retrieval artefact, named `name`, for templates/gallery.html.j2."""
    queries = _dicts(artefact.get("queries"))
    shown = queries[:MAX_ITEMS]
    hits = [(q.get("rank_i2t") == 1, q.get("rank_t2i") == 1) for q in shown]
    text_hits, image_hits = sum(a for a, _ in hits), sum(b for _, b in hits)
    hint = (
        f"{_of(len(shown), len(queries), 'query', 'queries')} at step {_step(artefact)}: "
        f"the right caption comes first in {text_hits}, the right image in {image_hits}."
    )
    return {
        "name": name,
        "hint": hint,
        "queries": [_query(q) | {"hit": all(hit)} for q, hit in zip(shown, hits, strict=True)],
        "heat": heat(queries, artefact.get("similarity")),
    }


def heat(queries: list[dict[str, Any]], similarity: object) -> tables.Heat | None:
    """Returns the queries' captions (rows) against their images (columns); None if `similarity` does not fit.

    similarity: cosine of each image (row) with each caption (column), as nested lists.
    """
    try:
        cosine_NN = np.array(similarity, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    num = len(queries)
    if not num or cosine_NN.shape != (num, num) or not (np.abs(cosine_NN) < 1e15).all():
        return None
    num = min(num, MAX_HEAT)
    cosine_NN = cosine_NN[:num, :num]
    low, high = float(cosine_NN.min()), float(cosine_NN.max())
    share_NN = (cosine_NN - low) / max(high - low, 1e-9)
    shown = [_captioned(query) for query in queries[:num]]
    lines = []
    for j, item in enumerate(shown):
        texts = [numbers.fixed(value, 2) for value in cosine_NN[:, j]]
        shares = [f"{share:.3f}" for share in share_NN[:, j]]
        lines.append(tables.HeatLine(item["caption"], list(zip(texts, shares)), j))
    first = int((cosine_NN.argmax(axis=1) == np.arange(num)).sum())
    hint = (
        f"Cosine similarity of {num} of these captions (rows) and images (columns), "
        f"{numbers.fixed(low, 2)} to {numbers.fixed(high, 2)}; "
        f"outlined: pairs. Among these, {first} images are nearest to their own caption."
    )
    return tables.Heat(shown, lines, hint=hint)


def captions(artefact: dict[str, Any]) -> dict[str, Any]:
    """Returns the items of one captions artefact: image, true caption, generated caption and where they differ."""
    items = _dicts(artefact.get("items"))
    shown = [_compared(item) for item in items[:MAX_ITEMS]]
    hint = (
        f"{_of(len(shown), len(items), 'image', 'images')} at step {_step(artefact)}: "
        f"{sum(item['exact'] for item in shown)} exact (up to case and spaces). "
        "Words that the true caption does not have at that place are underlined."
    )
    return {"hint": hint, "captioned": shown}


def _query(query: dict[str, Any]) -> dict[str, Any]:
    return _captioned(query) | {
        "rank_i2t": _rank(query.get("rank_i2t")),
        "rank_t2i": _rank(query.get("rank_t2i")),
        "texts": [_found(found) for found in _dicts(query.get("top_texts"))[:MAX_FOUND]],
        "images": [_found(found) for found in _dicts(query.get("top_images"))[:MAX_FOUND]],
    }


def _found(found: dict[str, Any]) -> dict[str, Any]:
    score = load.number(found.get("score"))
    text = "" if score is None else numbers.fixed(score, 3)
    return _captioned(found) | {"right": bool(found.get("right")), "score": text}


def _compared(item: dict[str, Any]) -> dict[str, Any]:
    true, generated = (str(item.get(k) or "") for k in ("caption", "generated"))
    exact = true.casefold().split() == generated.casefold().split()
    true, generated = _text(item, "caption"), _text(item, "generated")
    words = [(generated, False)] if exact else _differences(true, generated)
    return _captioned(item) | {"exact": exact, "generated": words}


def _captioned(item: dict[str, Any]) -> dict[str, Any]:
    uri = item.get("image")
    return {
        "image": Markup(uri) if isinstance(uri, str) and _IMAGE.fullmatch(uri) else "",
        "caption": _text(item, "caption"),
        "key": _text(item, "key"),
    }


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    return "" if value is None else pages.visible(value, MAX_TEXT)


def _rank(rank: object) -> str:
    """Returns a rank as "27th", "" for what is no rank."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 10**12:
        return ""
    teen = rank % 100 in (11, 12, 13)
    return numbers.count(rank) + ("th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th"))  # fmt: skip


def _differences(true: str, generated: str) -> list[tuple[str, bool]]:
    """Returns the generated caption in parts; True: words that `true` does not have at that place."""
    a, b, words = true.casefold().split(), generated.casefold().split(), generated.split()
    changes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    parts = [(" ".join(words[start:end]), op != "equal") for op, _, _, start, end in changes]
    return [part for part in parts if part[0]]


def _of(shown: int, num: int, one: str, many: str) -> str:
    first = f"The first {shown} of {num}" if shown < num else str(num)
    return f"{first} {one if num == 1 else many}"


def _step(artefact: dict[str, Any]) -> str:
    step = artefact.get("step")
    return numbers.count(step) if isinstance(step, int) and not isinstance(step, bool) else "?"


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
