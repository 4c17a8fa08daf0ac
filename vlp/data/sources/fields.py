"""Which columns of a foreign table are key, image, captions, language and label; rows → records.

The guess is by column name and is always shown; every part of it can be set by hand.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from vlp.core import check

KEY = ("key", "id", "image_id", "sample_id", "uid", "uuid")
IMAGE = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
PATH = ("image_path", "filepath", "file_path", "path", "file_name", "filename", "file")
CAPTION = (
    "caption captions text texts txt title alt alt_text description sentence sentences "
    "report short_caption long_caption synthetic_caption"
).split()
LANG, LABEL = ("lang", "language"), ("label", "cls", "class")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Column names; "" = none. `captions` in order; each becomes its captions' source tag."""

    key: str = ""
    image: str = ""  # encoded bytes, or {bytes, path} as Hugging Face writes it, or a path
    captions: tuple[str, ...] = ()
    lang: str = ""
    label: str = ""
    default_lang: str = "und"  # ISO 639-2: undetermined

    def show(self) -> str:
        """One line that says what was taken for what."""
        parts = [f"{k}={getattr(self, k) or '-'}" for k in ("key", "image", "lang", "label")]
        return " ".join([*parts, f"captions={','.join(self.captions) or '-'}"])


def sniff(columns: Iterable[str], given: Fields = Fields(), *, where: str) -> Fields:
    """Fills what `given` leaves open from column names. Raises: `UserError` on unknown columns."""
    columns = list(columns)
    by_name = {c.lower(): c for c in reversed(columns)}

    def first(names: Iterable[str]) -> str:
        return next((by_name[n] for n in names if n in by_name), "")

    for name in (given.key, given.image, given.lang, given.label, *given.captions):
        if name and name not in columns:
            raise check.unknown(f"{where}: column", name, columns)
    found = dataclasses.replace(
        given,
        key=given.key or first(KEY),
        image=given.image or first(IMAGE) or first(PATH),
        captions=given.captions or tuple(by_name[c] for c in CAPTION if c in by_name),
        lang=given.lang or first(LANG),
        label=given.label or first(LABEL),
    )
    if not found.captions:
        raise check.error(
            where,
            f"columns {columns}",
            f"a caption column such as {list(CAPTION[:4])}",
            "name it with --captions",
        )
    return found


def captions(
    row: Mapping[str, Any], columns: Iterable[str], lang: str, default_lang: str
) -> list[dict]:
    """Returns the captions of a row: every caption column, lists flattened, repeats dropped.

    `lang`: the column that names their language, "" if none does.
    Raises: ValueError for a value that is no text.
    """
    lang = str(row.get(lang) or default_lang) if lang else default_lang
    out: list[dict] = []
    for column in columns:
        value = row.get(column)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, bytes):
                text = text.decode("utf-8", "replace")
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"column {column!r} holds {text!r:.40}, no text")
            if (text := text.strip()) and all(text != c["text"] for c in out):
                out.append({"text": text, "source": column, "lang": lang})
    return out


def label(row: Mapping[str, Any], column: str) -> dict:
    """Returns {"label": …} if the row has one."""
    value = row.get(column) if column else None
    if value is None or value == "":
        return {}
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return {"label": value}
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole != value:
        raise ValueError(f"label {value!r} is neither a string nor a whole number")
    return {"label": whole}
