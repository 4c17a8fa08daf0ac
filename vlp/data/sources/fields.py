"""Finds the columns of a table that are key, image, captions, language and label, and turns rows into records.

The guess is by column name and is always shown; every part of it can be set by hand or switched
off. A wrong value in a guessed column never loses a pair: it is dropped and reported. In a column named
by the user it is an error. Not here: reading the formats.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlp.core import check
from vlp.data import text_ops

KEY = ("key", "id", "image_id", "sample_id", "uid", "uuid")
IMAGE = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
PATH = (
    "image_path filepath file_path path file_name filename file image_name image_file img_path"
).split()
CAPTION = (
    "caption captions text texts txt title alt alt_text description sentence sentences "
    "report short_caption long_caption synthetic_caption"
).split()
LANG, LABEL = ("lang", "language"), ("label", "cls", "class")
SPLITS = {  # usual names of splits, and what else they are called
    "train": ("training",),
    "val": ("validation", "valid"),
    "test": ("testing",),
    "dev": (),
}
DEEPEST = 100  # lists and objects in each other in JSON: what walks them recurses
GUESSED = ("key", "captions", "lang", "label")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Options for turning rows into records: column names ("": guess), and others.

    A name may be a path into a column, joined by "." or "/" ("sentences.raw"); lists are entered.
    """

    key: str = ""
    image: str = ""  # encoded bytes, or {bytes, path} as Hugging Face writes it, or a path
    captions: tuple[str, ...] = ()  # in order; each becomes its captions' source tag
    lang: str = ""
    label: str = ""
    default_lang: str = "und"  # ISO 639-2: undetermined
    off: tuple[str, ...] = ()  # of GUESSED: not used, even if a column has such a name
    group: bool | None = None  # rows of one image are one record; None: where that is cheap
    allow_outside: bool = False  # follow paths that lead out of the dataset's directory

    def show(self) -> str:
        """Returns one line that names the column used for each field."""
        parts = [f"{k}={getattr(self, k) or '-'}" for k in ("key", "image", "lang", "label")]
        return " ".join([*parts, f"captions={','.join(self.captions) or '-'}"])


@dataclasses.dataclass
class Notes:
    """Omitted data of a record: parts as (reason, detail), rows as entries of left_out.jsonl."""

    parts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)


def names_of(split: str) -> tuple[str, ...]:
    """Returns a split's name and its synonyms: "val" and "validation" are the same."""
    group = next(((s, *more) for s, more in SPLITS.items() if split in (s, *more)), ())
    return (split, *(n for n in group if n != split))


def existing(split: str, splits: Iterable[str]) -> str:
    """Returns the name of a split among `splits`; the given name if it is not one of them."""
    return next((n for n in names_of(split) if n in splits), split)


def check_splits(splits: Sequence[str]) -> None:
    """Raises a `UserError` if a split is named twice."""
    if repeated := sorted({s for s in splits if splits.count(s) > 1}):
        got = f"{', '.join(repeated)} twice in {list(splits)}"
        raise check.error("--splits", got, "each split once", "name it once")


def column(columns: Iterable[str], path: str) -> str:
    """Returns the column in which a path begins: that name itself, else the longest one before a
    "." or "/"; "" if there is none."""
    columns = [c for c in columns if c]
    if path in columns:
        return path
    return max((c for c in columns if path.startswith((f"{c}.", f"{c}/"))), key=len, default="")


def value(found: Any, path: str) -> Any:
    """Returns what lies at a path in a row, None if nothing; a list gives the list of its elements'."""
    if isinstance(found, (list, tuple)):
        return [x for x in (value(element, path) for element in found) if x is not None]
    if not isinstance(found, Mapping):
        return None
    if path in found:
        return found[path]
    for at in reversed([i for i, c in enumerate(path) if c in "./"]):
        if path[:at] in found:
            return value(found[path[:at]], path[at + 1 :])
    return None


def sniff(
    columns: Iterable[str], given: Fields = Fields(), *, where: str, nested: Iterable[str] = ()
) -> Fields:
    """Fills the empty fields of `given` by guessing from column names.

    nested: the known paths into columns, if all are known. Raises: `UserError` on unknown columns,
    and if there are neither captions nor a label.
    """
    columns, nested = list(columns), list(nested)
    by_name = {c.lower(): c for c in reversed(columns)}

    def first(names: Iterable[str]) -> str:
        return next((by_name[n] for n in names if n in by_name), "")

    for name in (given.key, given.image, given.lang, given.label, *given.captions):
        if not name or name in columns:
            continue
        if not column(columns, name) or (nested and name.replace("/", ".") not in nested):
            raise check.unknown(f"{where}: column", name, {*columns, *nested})
    guess = lambda part, found: (
        getattr(given, part) or (type(found)() if part in given.off else found)
    )
    texts = [by_name[c] for c in CAPTION if c in by_name]
    objects = {c: inner for c in texts if (inner := [n for n in nested if n.startswith(f"{c}.")])}
    if objects and len(objects) == len(texts) and guess("captions", "guessed") == "guessed":
        name, inner = next(iter(objects.items()))
        like = [n for n in inner if n.rsplit(".", 1)[-1] in ("raw", *CAPTION)]
        do = f"name one, as in --captions {(like or inner)[0]}"
        raise check.error(f"{where}: column {name!r}", f"objects with {inner}", "texts", do)
    found = dataclasses.replace(
        given,
        key=guess("key", first(KEY)),
        image=given.image or first(IMAGE) or first(PATH),
        captions=guess("captions", tuple(c for c in texts if c not in objects)),
        lang=guess("lang", first(LANG)),
        label=guess("label", first(LABEL)),
    )
    if not found.captions and not found.label:
        expected = f"a caption column such as {list(CAPTION[:4])}, or a label"
        do = "name it with --captions or --label"
        raise check.error(where, f"columns {columns}", expected, do)
    return found


def parsed(data: str | bytes, what: str) -> Any:
    """Returns the value of a JSON text that is not our own. Raises: ValueError, and nothing else, for what
    does not parse, is not UTF-8 or is nested deeper than `DEEPEST`."""
    deep = f"{what}: JSON nested too deep"
    try:
        data = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        found = json.loads(data)
    except RecursionError:
        raise ValueError(deep) from None
    except ValueError as e:
        raise ValueError(f"{what}: {e}") from None
    if isinstance(found, (list, dict)) and data.count("[") + data.count("{") > DEEPEST:
        level = [found]
        for _ in range(DEEPEST):
            inner = (y for x in level for y in (x.values() if isinstance(x, dict) else x))
            level = [y for y in inner if isinstance(y, (list, dict))]
        if level:
            raise ValueError(deep)
    return found


def text(value: str | bytes, what: str) -> str:
    """Returns the value as text. Raises: ValueError for bytes that are not UTF-8, and for what no
    UTF-8 can hold (half of a surrogate pair)."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()
        return value
    except UnicodeError as e:
        raise ValueError(f"{what} is not UTF-8 text ({e})") from None


def parts(row: Mapping[str, Any], found: Fields, given: Fields, notes: Notes) -> dict:
    """Returns {"captions": …} of a row, with its "label" if it has one.

    found, given: all columns, and those of them that the user named.
    """
    strict = bool(given.lang)
    return {
        "captions": captions(
            row, found.captions, found.lang, found.default_lang, strict=strict, notes=notes
        ),
        **label(row, found.label, strict=bool(given.label), notes=notes),
    }


def captions(
    row: Mapping[str, Any],
    columns: Iterable[str],
    lang: str,
    default_lang: str,
    *,
    strict: bool = False,
    notes: Notes | None = None,
) -> list[dict]:
    """Returns the captions of a row: every caption column, lists flattened, repeats dropped.

    `lang`: the column of their language ("": none); `strict`: whether the user named it.
    Raises: ValueError for text that is not UTF-8, and if no value is text.
    """
    lang = _lang(row, lang, default_lang, strict, notes)
    out: list[dict] = []
    wrong = ""
    for name in columns:
        for found in _leaves(value(row, name)):
            if not isinstance(found, (str, bytes)):
                wrong = wrong or f"column {name!r} holds {_no_text(name, found)}"
                continue
            found = text(found, f"column {name!r}").strip()
            if not text_ops.is_invisible(found) and all(found != c["text"] for c in out):
                out.append({"text": found, "source": name, "lang": lang})
    if wrong and not out:
        raise ValueError(wrong)
    if wrong and notes:
        notes.parts.append(("caption", wrong))
    return out


def _no_text(name: str, found: Any) -> str:
    if isinstance(found, Mapping) and found:
        return f"an object, no text; name one of its fields, as in --captions {name}.{next(iter(found))}"
    return f"{found!r:.40}, no text"


def _leaves(found: Any) -> Iterator[Any]:
    """Yields the values of nested lists that are not None."""
    if isinstance(found, (list, tuple)):
        for element in found:
            yield from _leaves(element)
    elif found is not None and found == found:  # NaN: how tables of numbers say nothing
        yield found


def _lang(
    row: Mapping[str, Any], name: str, default: str, strict: bool, notes: Notes | None
) -> str:
    found = value(row, name) if name else None
    if found is None or found in ("", b""):
        return default
    try:
        if isinstance(found, (str, bytes)):
            return text(found, f"column {name!r}")
        raise ValueError(f"language {found!r:.40} is not a string")
    except ValueError as e:
        return _unfit("lang", e, strict, notes) or default


def label(
    row: Mapping[str, Any], column: str, *, strict: bool = True, notes: Notes | None = None
) -> dict:
    """Returns {"label": …} if the row has one.

    Raises: ValueError, if `strict`, for a value that is neither text nor a whole number.
    """
    found = value(row, column) if column else None
    if found is None or found in ("", b""):
        return {}
    try:
        if isinstance(found, (str, bytes)):
            return {"label": text(found, f"column {column!r}")}
        try:
            whole = int(found)
        except (TypeError, ValueError, OverflowError):
            whole = None
        if whole is None or whole != found or not -(2**63) <= whole < 2**63:
            raise ValueError(f"label {found!r:.40} is neither a string nor a whole number")
        return {"label": whole}
    except ValueError as e:
        _unfit("label", e, strict, notes)
        return {}


def key(
    row: Mapping[str, Any], column: str, made: str, *, strict: bool, notes: Notes | None = None
) -> str:
    """Returns the key of a row, or `made` if it has none. Raises: ValueError for a row without a key if `strict`."""
    found = value(row, column) if column else None
    try:
        if isinstance(found, (str, bytes)):
            found = text(found, f"column {column!r}")
        elif isinstance(found, (list, tuple, Mapping)) or found != found:
            raise ValueError(f"key {found!r:.40} is neither a string nor a number")
        if found is not None and found != "":
            return str(found)
        if column:
            raise ValueError(f"no key in column {column!r}")
    except ValueError as e:
        _unfit("key", e, strict, notes)
    return made


def _unfit(part: str, e: ValueError, strict: bool, notes: Notes | None) -> str:
    """Notes a value that is left out; raises if the user named its column."""
    if strict:
        raise e
    if notes is not None:
        notes.parts.append((part, str(e)))
    return ""


def path_text(value: str | bytes, what: str) -> str:
    """Returns a path as text. Raises: ValueError for what no path can hold: no UTF-8, or a NUL."""
    found = text(value, what)
    if "\0" in found:
        raise ValueError(f"{what} holds a NUL character: {found!r:.80}")
    return found


def of_rows(
    numbers: Iterable[int],
    make: Callable[[int], dict],
    place: Callable[[int], dict],
    notes: Notes,
) -> dict:
    """Returns the record that the rows of one image make (`merged`); bad ones are left out, and noted by their place.

    Raises: ValueError if all are bad.
    """
    found, wrong = [], None
    for number in numbers:
        try:
            found.append(make(number))
        except ValueError as e:
            wrong = wrong or e
            notes.rows.append(place(number) | {"reason": "bad row", "detail": f"{e!s:.200}"})
    if wrong is not None and not found:
        raise wrong
    return merged(found, notes)


def merged(records: Iterable[dict], notes: Notes) -> dict:
    """Returns one record for several of one image: the first, with the captions of all.

    If the labels differ, the record has no label, and `notes` counts them.
    """
    first, *others = records
    captions = list(first["captions"])
    for other in others:
        captions += [c for c in other["captions"] if all(c["text"] != d["text"] for d in captions)]
    labels = list(dict.fromkeys(r["label"] for r in (first, *others) if "label" in r))
    first = {k: v for k, v in first.items() if k != "label"}
    if len(labels) == 1:
        first["label"] = labels[0]
    elif labels:
        notes.parts.append(("label", f"rows of one image have the labels {labels!r:.120}"))
    return first | {"captions": captions}


def is_label_alone(record: Mapping, source: Any) -> bool:
    """True for a record that needs no caption: it has a label, and its source no columns of captions."""
    has_columns = bool(getattr(source, "fields", Fields()).captions)
    return "label" in record and not record["captions"] and not has_columns
