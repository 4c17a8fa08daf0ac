"""Zero-shot classification: an image is given the class whose prompts are closest to it."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlp.core import check
from vlp.core.types import Apply, Result
from vlp.data.dataset import Dataset
from vlp.evals import calibration, embed, prompt_sets
from vlp.evals import io as ios

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Zeroshot:
    """Zero-shot classification: accuracy, top5 (with more than five classes), mean_per_class (mean over classes), ece.

    Omitted and counted: records without a label (num_unlabelled), with a class not in `classes` (num_other_classes)
    and, with bad_records "replace", unreadable ones (num_bad). Captions are not needed.

    label: the records' field that holds the class. phrases: text of each class (default: its name). templates: prompts,
    in which "{}" is the phrase. The embedding of a class is the normalised mean of its prompts' unit embeddings (CLIP,
    Radford et al. 2021, arXiv:2103.00020, §3.1.4). extra_splits: splits evaluated together with `split`. items: number
    of images in the report.

    class_set, template_set: instead of classes and phrases, and of templates: a file or a named set (`prompt_sets`). Of
    names without values, class k is that of the label k, or of the k-th of the sorted labels. scale: of the cosines in
    the softmax that ece (expected calibration error) is of; 0: the model's own, 100 if it has none. frequency: a file
    of "value<TAB>number" lines; adds the correlation of a class's accuracy with its frequency. data: another dataset.
    """

    reads_captions: ClassVar = False
    label: str
    classes: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    split: str = "test"
    extra_splits: tuple[str, ...] = ()
    batch: int = 64
    every_steps: int = 0
    items: int = 12
    class_set: str = ""
    template_set: str = ""
    scale: float = 0.0
    frequency: str = ""
    data: ios.Source = ios.Source()

    def __post_init__(self) -> None:
        where, do = "config.evals: zeroshot", "correct these fields"
        if self.class_set and (self.classes or self.phrases):
            raise check.error(f"{where}.class_set", "classes too", "one of the two", "drop one")
        few = len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)
        if few and not self.class_set:
            raise check.error(f"{where}.classes", self.classes, "two or more, all different", do)
        if self.phrases and len(self.phrases) != len(self.classes):
            expected = f"one for each of {len(self.classes)} classes"
            raise check.error(f"{where}.phrases", f"{len(self.phrases)}", expected, do)
        if not self.templates or not all("{}" in t for t in self.templates):
            raise check.error(f"{where}.templates", self.templates, "texts with {}", do)
        if len(set(self.splits)) < len(self.splits):
            expected = "splits that differ (an image counts once)"
            raise check.error(f"{where}.extra_splits", self.splits, expected, do)
        bounds = {
            "items": (self.items >= 0, "at least 0"),
            "scale": (0 <= self.scale <= 1e6, "in 0 … 1e6"),
        }
        check.bounds(where, self, bounds)

    def with_sets(self, io: ios.IO, where: str = "config.evals: zeroshot") -> Zeroshot:
        """Returns the evaluator with the classes, phrases and templates that its sets name."""
        changes: dict[str, Any] = {}
        if self.template_set:
            found = prompt_sets.templates(self.template_set, f"{where}.template_set")
            changes |= {"templates": found, "template_set": ""}
        if self.class_set:
            values, phrases = prompt_sets.classes(self.class_set, f"{where}.class_set")
            values = values or self._values(len(phrases), io, where)
            changes |= {"classes": values, "phrases": phrases, "class_set": ""}
        return dataclasses.replace(self, **changes)

    def _values(self, num: int, io: ios.IO, where: str) -> tuple[str, ...]:
        """Returns the labels that `num` names stand for, in their order."""
        found = {str(v) for split in self.splits for v in labels(io.open(split), self.label)}
        if all(v.isdecimal() and int(v) < num for v in found):
            return tuple(map(str, range(num)))
        if len(found) != num:
            got = f"{num} names for {len(found)} values of {self.label!r}"
            do = "write value<TAB>name lines"
            raise check.error(f"{where}.class_set", got, "a name for each value", do)
        return tuple(sorted(found))

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError unless the records have the label and every class has an image.

        Of a set, or with data of its own, one class is enough: ImageNet-A has 200 of 1,000.
        """
        some = bool(self.class_set) or self.data != ios.Source()
        self.with_sets(io, where).check_classes(io, where, some)

    def check_classes(self, io: ios.IO, where: str, some: bool) -> None:
        """As `check`, with the classes known; some: one class is enough."""
        found = {value for split in self.splits for value in chosen(io.open(split), self, where)[1]}
        if self.frequency:
            calibration.frequencies(self.frequency, self.classes, f"{where}.frequency")
        missing = [name for name in self.classes if name not in found]
        if len(missing) == len(self.classes) or (missing and not some):
            got = f"no record of {missing} in {list(self.splits)}"
            raise check.error(f"{where}.classes", got, f"values of {self.label!r}", "correct them")
        self.check_prompts(io, where, warn=some)

    def check_prompts(self, io: ios.IO, where: str, warn: bool = False) -> None:
        """Raises UserError (`warn`: warns) for two classes with the same prompts; warns of prompts that are cut."""
        length, known, num_cut, same = io.data.text_len, {}, 0, []
        for name, phrase in zip(self.classes, self.phrases or self.classes):
            found = [prompt_sets.encoded(io.tokenizer, phrase, t, length) for t in self.templates]
            ids = tuple(tuple(ids_L.tolist()) for ids_L, _ in found)
            num_cut += sum(cut for _, cut in found)
            if ids in known and warn:  # OpenAI's names of ImageNet have "sunglasses" twice
                same.append(name)
            elif ids in known:
                got = f"the same tokens for {known[ids]!r} and {name!r}"
                do = "change the phrases or templates, or raise config.data.text_len"
                expected = f"prompts that differ in their first {length} tokens"
                raise check.error(f"{where}.phrases", got, expected, do)
            known[ids] = name
        if same:
            log.warning("%s: the prompts of %s are those of another class", where, same)
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
        return embed.image(apply, image), embed.text(apply, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        yield from self.with_sets(io).results(apply, mesh, io)

    def results(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        """Yields the results, with the classes and templates known."""
        class_CE = embed_classes(apply, mesh, io, self)
        images, truth, shown = [], [], []
        place = {name: c for c, name in enumerate(self.classes)}
        left_out: collections.Counter[str] = collections.Counter()
        for split in self.splits:
            dataset, names, without = chosen(io.open(split), self, "zeroshot")
            zi_NE, good_N = embed.images(apply, dataset, self.batch, mesh)
            left_out.update(without)
            left_out["num_bad"] += int((~good_N).sum())
            images.append(embed.unit(zi_NE[good_N]))
            good = np.flatnonzero(good_N).tolist()
            truth += [place[names[i]] for i in good]
            shown += [(dataset, i) for i in good]
        zi_NE, truth_N = np.concatenate(images), np.array(truth, dtype=int)
        scale = self.scale or scale_of(apply)
        found = calibration.answers(zi_NE, class_CE, truth_N, scale)
        right_N = found.rank_N == 1
        where = io.provenance(io.open(self.split)) | {"num": len(truth_N)}
        where |= {"split": "+".join(self.splits), "num_classes": len(self.classes)}
        where |= {
            name: left_out[name] for name in ("num_unlabelled", "num_other_classes", "num_bad")
        }
        where |= {"templates": ios.digest(self.templates), "classes": self.digest(), "scale": scale}
        yield Result("accuracy", float(right_N.mean()), where)
        if len(self.classes) > 5:
            yield Result("top5", float((found.rank_N <= 5).mean()), where)
        there_C = np.unique(truth_N)
        per_class_C = np.array([right_N[truth_N == c].mean() for c in there_C])
        yield Result("mean_per_class", float(per_class_C.mean()), where)
        yield Result("ece", calibration.ece(found.confidence_N, right_N), where)
        if self.frequency:
            often_C = calibration.frequencies(self.frequency, self.classes, "zeroshot.frequency")
            for name, value in calibration.against_frequency(per_class_C, often_C[there_C]).items():
                yield Result(name, value, where)
        artefact = {
            "kind": "zeroshot",
            "split": where["split"],
            "num": len(truth_N),
            "label": self.label,
            "classes": list(self.classes),
            "confusion": confusion(found.guess_N, truth_N, len(self.classes)).tolist(),
            "items": _items(self, shown, zi_NE, class_CE, truth_N) if self.items else [],
        }
        io.write(f"zeroshot_{self.label}_{self.split}", artefact)

    def digest(self) -> str:
        """Returns a digest of the classes with their phrases."""
        pairs = zip(self.classes, self.phrases or self.classes)
        return ios.digest([f"{value}\t{phrase}" for value, phrase in pairs])


def labels(dataset: Dataset, label: str) -> Iterator[str | int]:
    """Yields the labels of all records that have one."""
    for i in range(dataset.num_records):
        try:
            value = dataset.source[i].get(label)
        except Exception:  # `chosen` counts or names it
            continue
        if value is not None and value != "" and value == value:
            yield value


def chosen(
    dataset: Dataset, zeroshot: Zeroshot, where: str
) -> tuple[Dataset, list[str], dict[str, int]]:
    """The records of one of the classes, their classes, and how many others there are by reason.

    Raises UserError if no record has such a field.
    """
    ids, names, fields, known = [], [], set(), set(zeroshot.classes)
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
        elif str(value) in known:
            ids.append(i)
            names.append(str(value))
    if unlabelled + bad == dataset.num_records:
        raise check.unknown(f"{where}.label", zeroshot.label, fields)
    some = ios.subset(dataset, ids)
    others = dataset.num_records - unlabelled - bad - len(ids)
    counts = {"num_unlabelled": unlabelled, "num_other_classes": others, "num_bad": bad}
    return some, names, counts


def embed_classes(
    apply: Apply, mesh: Mesh, io: ios.IO, zeroshot: Zeroshot
) -> Float[np.ndarray, "C E"]:
    """One unit vector for each class: the mean of its prompts' unit embeddings, normalised."""
    phrases = zeroshot.phrases or zeroshot.classes
    each = ((phrase, template) for phrase in phrases for template in zeroshot.templates)
    ids = (prompt_sets.encoded(io.tokenizer, *pair, io.data.text_len)[0] for pair in each)
    zt_NE = embed.unit(embed.texts(apply, ids, zeroshot.batch, mesh))
    return embed.unit(zt_NE.reshape(len(phrases), len(zeroshot.templates), -1).mean(axis=1))


def scale_of(apply: Apply) -> float:
    """Returns the model's logit scale; 100, CLIP's largest, if it has none."""
    if not hasattr(apply.model, "scale_bias"):
        return 100.0
    return float(apply.jit(_scale)())


def _scale(apply: Apply) -> jax.Array:
    return apply("scale_bias")[0]


def confusion(
    guess_N: Int[np.ndarray, "N"], truth_N: Int[np.ndarray, "N"], num: int
) -> Int[np.ndarray, "C C"]:
    """How many images of class (row) were taken for class (column); the first of equal scores is taken."""
    return np.bincount(truth_N * num + guess_N, minlength=num * num).reshape(num, num)


def _items(
    zeroshot: Zeroshot, shown: list, zi_NE: np.ndarray, class_CE: np.ndarray, truth_N: np.ndarray
) -> list[dict[str, Any]]:
    chosen = np.linspace(0, len(truth_N) - 1, min(zeroshot.items, len(truth_N))).astype(int)
    items = []
    for n in chosen.tolist():
        dataset, record = shown[n]
        scores_C = class_CE @ zi_NE[n]
        items.append({
            "image": ios.data_uri(dataset.eval_batch(record, 1, reads=("image",))["image"][0]),
            "caption": dataset.source.caption(record),
            "key": dataset.keys([record])[0],
            "truth": zeroshot.classes[int(truth_N[n])],
            "answer": zeroshot.classes[int(scores_C.argmax())],
            "scores": scores_C.tolist(),
        })  # fmt: skip
    return items
