"""Pictures of what the run does: retrieval with its five best and as a heat map, captions beside their images.

Right answers carry a ✓ and a word, never colour alone. Images must be data URIs; anything else is
left out, so that the page never asks the network. Ranks count from 1.
"""

import difflib
import re
from typing import Any

import numpy as np

from vlp.core import pages
from vlp.report import load, numbers

MAX_ITEMS = 60
MAX_HEAT = 24
MAX_FOUND = 10  # answers to a query
MAX_TEXT = 500  # characters of a caption
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")
_RIGHT = '<span class="right"><span aria-hidden="true">✓</span> right</span>'


def retrieval(name: str, artefact: dict[str, Any]) -> str:
    """Returns the queries of one retrieval artefact, with a filter for the missed ones."""
    queries = _dicts(artefact.get("queries"))
    shown = queries[:MAX_ITEMS]
    hits = [_hit(q) for q in shown]
    text_hits, image_hits = sum(a for a, _ in hits), sum(b for _, b in hits)
    words = (
        f"{_of(len(shown), len(queries), 'query', 'queries')} at step {_step(artefact)}: "
        f"the right caption comes first in {text_hits}, the right image in {image_hits}."
    )
    cards = [_query(q, hit) for q, hit in zip(shown, hits, strict=True)]
    return (
        f'<div class="gallery"><p class="hint">{words}</p>{_filter(name)}'
        f'<div class="queries">{"".join(cards)}</div></div>{heat(queries, artefact.get("similarity"))}'
    )


def heat(queries: list[dict[str, Any]], similarity: object) -> str:
    """Returns the queries' captions (rows) against their images (columns) as a heat map; "" without the numbers."""
    try:
        cosine_NN = np.array(similarity, np.float64)  # image × caption
    except (TypeError, ValueError, OverflowError):
        return ""
    num = len(queries)
    if not num or cosine_NN.shape != (num, num) or not (np.abs(cosine_NN) < 1e15).all():
        return ""
    shown = min(num, MAX_HEAT)
    cosine_NN, queries = cosine_NN[:shown, :shown], queries[:shown]
    low, high = float(cosine_NN.min()), float(cosine_NN.max())
    share_NN = (cosine_NN - low) / max(high - low, 1e-9)
    head = "".join(f"<th>{_image(q.get('image'), q.get('caption'))}</th>" for q in queries)
    body = ""
    for j, query in enumerate(queries):
        cells = "".join(
            f'<td class="heat{" diagonal" * (i == j)}" style="--share:{share_NN[i, j]:.3f}">'
            f"{numbers.fixed(cosine_NN[i, j], 2)}</td>"
            for i in range(shown)
        )
        body += f"<tr><th>{pages.text(query.get('caption', ''), MAX_TEXT)}</th>{cells}</tr>"
    first = int((cosine_NN.argmax(axis=1) == np.arange(shown)).sum())
    words = (
        f"Cosine similarity of {shown} of these captions (rows) and images (columns), "
        f"{numbers.fixed(low, 2)} to {numbers.fixed(high, 2)}; "
        f"outlined: pairs. Among these, {first} images are nearest to their own caption."
    )
    return (
        f'<details class="more"><summary>Image × caption similarity</summary><p class="hint">{words}</p>'
        f'<div class="card wide"><div class="scroll">'
        f'<table class="numbers confusion similarity"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div></details>"
    )


def captions(name: str, artefact: dict[str, Any]) -> str:
    """Returns the items of one captions artefact: image, true caption, generated one."""
    items = _dicts(artefact.get("items"))
    shown = items[:MAX_ITEMS]
    exact = sum(_exact(item) for item in shown)
    words = (
        f"{_of(len(shown), len(items), 'image', 'images')} at step {_step(artefact)}: "
        f"{exact} exact (up to case and spaces). "
        "Words that the true caption does not have at that place are underlined."
    )
    cards = "".join(_captioned(item) for item in shown)
    return f'<p class="hint">{words}</p><div class="captions">{cards}</div>'


# --- retrieval


def _query(query: dict[str, Any], hit: tuple[bool, bool]) -> str:
    texts = "".join(_text(found) for found in _dicts(query.get("top_texts"))[:MAX_FOUND])
    images = "".join(_thumb(found) for found in _dicts(query.get("top_images"))[:MAX_FOUND])
    caption = pages.text(query.get("caption", ""), MAX_TEXT)
    return (
        f'<article class="card query {"hit" if all(hit) else "missed"}">'
        f'<section><h4>Image → text {_rank(query.get("rank_i2t"))}</h4><div class="ask">'
        f"{_image(query.get('image'), query.get('caption'))}<ol>{texts}</ol></div></section>"
        f"<section><h4>Text → image {_rank(query.get('rank_t2i'))}</h4>"
        f'<blockquote>{caption}</blockquote><ol class="thumbs">{images}</ol></section>'
        f"<footer><code>{pages.text(query.get('key', ''), MAX_TEXT)}</code></footer></article>"
    )


def _text(found: dict[str, Any]) -> str:
    right = bool(found.get("right"))
    return (
        f"<li{' class=is-right' if right else ''}><span>{pages.text(found.get('caption', ''), MAX_TEXT)} "
        f"{_RIGHT if right else ''}</span>{_score(found)}</li>"
    )


def _thumb(found: dict[str, Any]) -> str:
    right = bool(found.get("right"))
    image = _image(found.get("image"), found.get("caption"))
    return f"<li{' class=is-right' if right else ''}>{image}{_RIGHT if right else ''}{_score(found)}</li>"


def _score(found: dict[str, Any]) -> str:
    score = load.number(found.get("score"))
    return "" if score is None else f'<span class="score">{numbers.fixed(score, 3)}</span>'


def _rank(rank: object) -> str:
    """Returns a chip that says where the right one came; ranks count from 1."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 10**12:
        return ""
    if rank == 1:
        return '<span class="chip good">✓ first</span>'
    return f'<span class="chip">right one is {numbers.count(rank)}{_ordinal(rank)}</span>'


def _ordinal(rank: int) -> str:
    teen = rank % 100 in (11, 12, 13)
    return "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")


def _hit(query: dict[str, Any]) -> tuple[bool, bool]:
    return query.get("rank_i2t") == 1, query.get("rank_t2i") == 1


def _filter(name: str) -> str:
    """Returns the choice all / missed / right; plain CSS acts on it."""
    group = pages.text(f"show-{name}")
    choices = (("all", "all"), ("missed", "missed"), ("hit", "right both ways"))
    labels = [
        f'<label><input type="radio" name="{group}" value="{value}"'
        f"{' checked' if value == 'all' else ''}> {text}</label>"
        for value, text in choices
    ]
    return f'<fieldset class="filter"><legend>show</legend>{"".join(labels)}</fieldset>'


# --- captions


def _captioned(item: dict[str, Any]) -> str:
    exact = _exact(item)
    true, generated = (pages.visible(item.get(k, ""), MAX_TEXT) for k in ("caption", "generated"))
    mark = (
        '<span class="chip good">✓ exact</span>' if exact else '<span class="chip">differs</span>'
    )
    return (
        f'<article class="card captioned">{_image(item.get("image"), true)}<div>{mark}<dl>'
        f"<dt>true</dt><dd>{pages.text(true)}</dd><dt>generated</dt>"
        f"<dd>{pages.text(generated) if exact else _differences(true, generated)}</dd></dl>"
        f"<code>{pages.text(item.get('key', ''), MAX_TEXT)}</code></div></article>"
    )


def _differences(true: str, generated: str) -> str:
    """Returns the generated caption with the words underlined that `true` lacks at that place."""
    if not generated.strip():
        return "<i>nothing</i>"
    a, b = true.casefold().split(), generated.casefold().split()
    words = generated.split()
    out = []
    for op, _, _, start, end in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        text = pages.text(" ".join(words[start:end]))
        if text:
            out.append(text if op == "equal" else f"<mark>{text}</mark>")
    return " ".join(out)


def _exact(item: dict[str, Any]) -> bool:
    true, generated = (str(item.get(k, "")).casefold().split() for k in ("caption", "generated"))
    return true == generated


# --- both


def _image(uri: object, caption: object) -> str:
    if not isinstance(uri, str) or not _IMAGE.fullmatch(uri):
        return '<span class="no-image">no image</span>'
    text = pages.text(caption or "", MAX_TEXT)
    return f'<img src="{uri}" alt="{text}" title="{text}" width="96" height="96" decoding="async">'


def _of(shown: int, num: int, one: str, many: str) -> str:
    first = f"The first {shown} of {num}" if shown < num else str(num)
    return f"{first} {one if num == 1 else many}"


def _step(artefact: dict[str, Any]) -> str:
    step = artefact.get("step")
    return numbers.count(step) if isinstance(step, int) and not isinstance(step, bool) else "?"


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
