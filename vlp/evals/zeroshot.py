"""Zero-shot classification: an image is given the class whose prompts are closest to it."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from vlp.core import check, interrupt, local
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.data import order
from vlp.data.dataset import Dataset
from vlp.data.tokenizer import Tokenizer
from vlp.evals import io as ios

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Zeroshot:
    """Zero-shot classification: accuracy, top5 (with more than five classes), mean_per_class (mean over classes).

    Omitted and counted: records without a label (num_unlabelled), with a class not in `classes` (num_other_classes)
    and, with bad_records "replace", unreadable ones (num_bad). Captions are not needed.

    label: the records' field that holds the class. phrases: text of each class (default: its name). templates: prompts,
    in which "{}" is the phrase. The embedding of a class is the normalised mean of its prompts' unit embeddings (CLIP,
    Radford et al. 2021, arXiv:2103.00020, §3.1.4). extra_splits: splits evaluated together with `split`. items: number
    of images in the report.
    """

    reads_captions: ClassVar = False
    label: str
    classes: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    split: str = "test"
    extra_splits: tuple[str, ...] = ()
    batch: int = 64
    every_steps: int = 0
    items: int = 12

    def __post_init__(self) -> None:
        where, do = "config.evals: zeroshot", "correct these fields"
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise check.error(f"{where}.classes", self.classes, "two or more, all different", do)
        if self.phrases and len(self.phrases) != len(self.classes):
            expected = f"one for each of {len(self.classes)} classes"
            raise check.error(f"{where}.phrases", f"{len(self.phrases)}", expected, do)
        if not self.templates or not all("{}" in t for t in self.templates):
            raise check.error(f"{where}.templates", self.templates, "texts with {}", do)
        if len(set(self.splits)) < len(self.splits):
            expected = "splits that differ (an image counts once)"
            raise check.error(f"{where}.extra_splits", self.splits, expected, do)
        check.bounds(where, self, {"items": (self.items >= 0, "at least 0")})

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError unless the records have the label and every class has an image."""
        found = {value for split in self.splits for value in chosen(io.open(split), self, where)[1]}
        missing = [name for name in self.classes if name not in found]
        if missing:
            got = f"no record of {missing} in {list(self.splits)}"
            raise check.error(f"{where}.classes", got, f"values of {self.label!r}", "correct them")
        self.check_prompts(io, where)

    def check_prompts(self, io: ios.IO, where: str) -> None:
        """Raises UserError for two classes with the same prompts; warns of prompts that are cut."""
        length, known, num_cut = io.data.text_len, {}, 0
        for name, phrase in zip(self.classes, self.phrases or self.classes):
            found = [encoded(io.tokenizer, phrase, t, length) for t in self.templates]
            ids = tuple(tuple(ids_L.tolist()) for ids_L, _ in found)
            num_cut += sum(cut for _, cut in found)
            if ids in known:
                got = f"the same tokens for {known[ids]!r} and {name!r}"
                do = "change the phrases or templates, or raise config.data.text_len"
                expected = f"prompts that differ in their first {length} tokens"
                raise check.error(f"{where}.phrases", got, expected, do)
            known[ids] = name
        if num_cut:
            total = len(self.classes) * len(self.templates)
            log.warning(
                "%s: %d of %d prompts are shortened to text_len %d", where, num_cut, total, length
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split, *self.extra_splits)

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return _image(apply, image), _text(apply, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        class_CE = embed_classes(apply, mesh, io, self)
        scores, truth, shown = [], [], []
        left_out: collections.Counter[str] = collections.Counter()
        for split in self.splits:
            dataset, names, without = chosen(io.open(split), self, "zeroshot")
            zi_NE, good_N = embed_images(apply, dataset, self.batch, mesh)
            left_out.update(without)
            left_out["num_bad"] += int((~good_N).sum())
            scores.append(unit(zi_NE[good_N]) @ class_CE.T)
            good = np.flatnonzero(good_N).tolist()
            truth += [self.classes.index(names[i]) for i in good]
            shown += [(dataset, i) for i in good]
        scores_NC, truth_N = np.concatenate(scores), np.array(truth, dtype=int)
        confusion_CC = confusion(scores_NC, truth_N)
        rank_N = rank_of_class(scores_NC, truth_N)
        per_class_C = np.array([(rank_N[truth_N == c] == 1).mean() for c in np.unique(truth_N)])
        where = io.provenance(io.open(self.split)) | {"num": len(truth_N)}
        where |= {"split": "+".join(self.splits), "num_classes": len(self.classes)}
        where |= {
            name: left_out[name] for name in ("num_unlabelled", "num_other_classes", "num_bad")
        }
        yield Result("accuracy", float((rank_N == 1).mean()), where)
        if len(self.classes) > 5:
            yield Result("top5", float((rank_N <= 5).mean()), where)
        yield Result("mean_per_class", float(per_class_C.mean()), where)
        artefact = {
            "kind": "zeroshot",
            "split": where["split"],
            "num": len(truth_N),
            "label": self.label,
            "classes": list(self.classes),
            "confusion": confusion_CC.tolist(),
            "items": _items(self, shown, scores_NC, truth_N) if self.items else [],
        }
        io.write(f"zeroshot_{self.label}_{self.split}", artefact)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some records of a source; those of a class may have no caption."""

    source: Any
    ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[self.ids[i]]

    def caption(self, i: int) -> str:
        """The record's first own caption, if it has any."""
        captions = self.source[self.ids[i]].get("captions") or [{"text": ""}]
        return captions[0]["text"]


def chosen(
    dataset: Dataset, zeroshot: Zeroshot, where: str
) -> tuple[Dataset, list[str], dict[str, int]]:
    """The records of one of the classes, their classes, and how many others there are by reason.

    Raises UserError if no record has such a field.
    """
    ids, names, fields = [], [], set()
    unlabelled = bad = 0
    for i in range(dataset.num_records):
        try:
            record = dataset.source[i]
        except Exception as e:  # by source: OSError, zlib.error, BadImage …
            if dataset.data.bad_records == "error":
                got = f"record {i}, which cannot be read ({type(e).__name__}: {e!s:.80})"
                do = "repair the data, or set config.data.bad_records='replace'"
                raise check.error(f"{where}.split", got, "good records", do) from e
            bad += 1
            continue
        fields |= {k for k, v in record.items() if isinstance(v, str | int) and k != "key"}
        value = record.get(zeroshot.label)
        if value is None or value == "" or value != value:  # NaN: an empty cell of a table
            unlabelled += 1
        elif str(value) in zeroshot.classes:
            ids.append(i)
            names.append(str(value))
    if unlabelled + bad == dataset.num_records:
        raise check.unknown(f"{where}.label", zeroshot.label, fields)
    data = dataclasses.replace(dataset.data, mixture=())
    some = Dataset(data, Chosen(dataset.source, tuple(ids)), dataset.tokenizer)
    others = dataset.num_records - unlabelled - bad - len(ids)
    counts = {"num_unlabelled": unlabelled, "num_other_classes": others, "num_bad": bad}
    return some, names, counts


def prompts(phrase: str, templates: Sequence[str]) -> list[str]:
    """The prompts of a class; an empty phrase leaves no double space."""
    return [" ".join(template.replace("{}", phrase).split()) for template in templates]


def encoded(
    tokenizer: Tokenizer, phrase: str, template: str, length: int
) -> tuple[Int[np.ndarray, "L"], bool]:
    """A prompt's ids, and whether it was too long: then it loses words of the template, from its beginning up to the
    class, before it loses the class."""
    before, _, after = template.partition("{}")
    words = before.split(" ")  # the last one is next to the class
    for dropped in range(len(words)):
        text = prompts(phrase, [" ".join(words[dropped:]) + "{}" + after])[0]
        if (tokenizer.encode(text, 2 * length)[length:] == tokenizer.pad_id).all():
            return tokenizer.encode(text, length), dropped > 0
    return tokenizer.encode(text, length), True


def embed_classes(
    apply: Apply, mesh: Mesh, io: ios.IO, zeroshot: Zeroshot
) -> Float[np.ndarray, "C E"]:
    """One unit vector for each class: the mean of its prompts' unit embeddings, normalised."""
    phrases = zeroshot.phrases or zeroshot.classes
    each = [(phrase, template) for phrase in phrases for template in zeroshot.templates]
    ids_NL = np.stack([encoded(io.tokenizer, *pair, io.data.text_len)[0] for pair in each])
    run, found = apply.jit(_text), []
    mine_b = np.concatenate([np.arange(b.start, b.stop) for b in local.rows(zeroshot.batch, mesh)])
    for start in range(0, len(ids_NL), zeroshot.batch):
        interrupt.poll()
        mine = ids_NL[np.minimum(start + mine_b, len(ids_NL) - 1)].astype(np.int32)
        zt_BE = meshes.to_host(run(meshes.to_global({"text": mine}, mesh)["text"]))
        found.append(zt_BE[: len(ids_NL) - start])
    zt_NE = unit(np.concatenate(found))
    return unit(zt_NE.reshape(len(phrases), len(zeroshot.templates), -1).mean(axis=1))


def embed_images(
    apply: Apply, dataset: Dataset, batch: int, mesh: Mesh
) -> tuple[Float[np.ndarray, "N E"], Bool[np.ndarray, "N"]]:
    """Image embeddings of all records, in record order, and whether each is the record's own (no substitute's)."""
    run, found, used = apply.jit(_image), [], []
    for rows, mask_B in ios.batches(dataset, batch, mesh, reads=("image",)):
        found.append(meshes.to_host(run(rows["image"]))[mask_B])
        used.append(order.join_words(meshes.to_host(rows["record"]))[mask_B])
    return np.concatenate(found), np.concatenate(used) == np.arange(dataset.num_records)


def _image(apply: Apply, image: jax.Array) -> jax.Array:
    return apply("image", image)["embed"]


def _text(apply: Apply, text: jax.Array) -> jax.Array:
    return apply("text", text)["embed"]


def unit(z: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64; a row of zeros stays."""
    z = z.astype(np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def rank_of_class(
    scores_NC: Float[np.ndarray, "N C"], truth_N: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """Rank (1 is best) of the true class; a tie counts against it, and so does NaN."""
    right_N1 = np.take_along_axis(scores_NC, truth_N[:, None], axis=1)
    return (~(scores_NC < right_N1)).sum(axis=1)


def confusion(
    scores_NC: Float[np.ndarray, "N C"], truth_N: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "C C"]:
    """How many images of class (row) were taken for class (column); the first of equal scores is taken."""
    num = scores_NC.shape[1]
    pairs_N = truth_N * num + scores_NC.argmax(axis=1)
    return np.bincount(pairs_N, minlength=num * num).reshape(num, num)


def _items(
    zeroshot: Zeroshot, shown: list, scores_NC: np.ndarray, truth_N: np.ndarray
) -> list[dict[str, Any]]:
    chosen = np.linspace(0, len(truth_N) - 1, min(zeroshot.items, len(truth_N))).astype(int)
    items = []
    for n in chosen.tolist():
        dataset, record = shown[n]
        best = int(scores_NC[n].argmax())
        items.append({
            "image": ios.data_uri(dataset.eval_batch(record, 1, reads=("image",))["image"][0]),
            "caption": dataset.source.caption(record),
            "key": dataset.keys([record])[0],
            "truth": zeroshot.classes[int(truth_N[n])],
            "answer": zeroshot.classes[best],
            "scores": scores_NC[n].tolist(),
        })  # fmt: skip
    return items
