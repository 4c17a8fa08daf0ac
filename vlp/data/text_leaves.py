"""Leaves that are texts: captions by role, sentences, negative texts.

A missing text is [bos] [eos], with mask False.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from vlp.data import text_ops
from vlp.data.config import Data
from vlp.data.draws import Draws, Row, Spec, captions_of, entries


@dataclasses.dataclass(frozen=True)
class Text:
    """text i32[B L]: a caption.

    With captions="all", text i32[B K L]: the first K; and text.mask bool[B K], False where a record has fewer.
    """

    config: ClassVar = "captions, num_captions, caption_sources, langs, text_len, shorten"
    stage: ClassVar = "text"

    def spec(self, data: Data, batch: int) -> Spec:
        if data.captions != "all":
            return {"text": ((batch, data.text_len), np.int32)}
        shape = (batch, data.num_captions, data.text_len)
        return {"text": (shape, np.int32), "text.mask": (shape[:2], np.bool_)}

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        data, policy = draws.data, draws.data.captions
        if not draws.training and policy != "all":
            policy = "first"
        drawn = policy in ("uniform", "weighted")
        texts = captions_of(
            record,
            data,
            policy,
            sources={c.name: c.weight for c in data.caption_sources},
            rng=draws.rng_of_key("caption", record) if drawn else None,
            is_blank=draws.is_blank,
        )
        rows_KL = row["text"].reshape(-1, data.text_len)
        for (text, was_cut), ids_L in zip(shortened(texts, draws, "shorten"), rows_KL):
            draws.encode(text, ids_L, was_cut)
        if policy == "all":
            draws.encode_all((), rows_KL[len(texts) :], row["text.mask"][len(texts) :])
            row["text.mask"][: len(texts)] = True


def shortened(texts: Sequence[str], draws: Draws, name: str) -> Iterable[tuple[str, bool]]:
    """Yields each text as `data.shorten` cuts it in training, and whether it was cut; "truncate" is the tokenizer's."""
    data = draws.data
    if data.shorten == "truncate" or not draws.training:
        yield from ((text, False) for text in texts)
        return
    rng = draws.rng(name)
    for text in texts:
        short = text_ops.shorten(
            text, data.text_len - 2, data.shorten, rng
        )  # leaves room for bos and eos
        short = text if draws.is_blank(short) else short
        yield short, short is not text


@dataclasses.dataclass(frozen=True)
class TextSlot:
    """text.<slot> i32[B L]: a caption of those with the slot's source tags; text.<slot>.mask bool[B]."""

    config: ClassVar = "slots"
    stage: ClassVar = "text"
    name: str

    @staticmethod
    def each(data: Data) -> "list[TextSlot]":
        return [TextSlot(name) for name in data.slots]

    def spec(self, data: Data, batch: int) -> Spec:
        leaf = f"text.{self.name}"
        return {leaf: ((batch, data.text_len), np.int32), f"{leaf}.mask": ((batch,), np.bool_)}

    def is_missing(self, record: dict, data: Data) -> bool:
        tags = data.slots[self.name].sources or (self.name,)
        captions = record.get("captions") or ()
        return not any(isinstance(c, dict) and c.get("source") in tags for c in captions)

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        slot, leaf = draws.data.slots[self.name], f"text.{self.name}"
        tags, texts = slot.sources or (self.name,), []
        policy = slot.captions if draws.training else "first"
        try:
            found = captions_of(
                record,
                draws.data,
                policy,
                sources=dict.fromkeys(tags, 1.0),
                rng=draws.rng_of_key(leaf, record) if policy != "first" else None,
                is_blank=draws.is_blank,
            )
            texts = list(shortened(found, draws, f"{leaf}:shorten"))
        except text_ops.BadCaption as e:
            if e.reason != "no_caption":
                raise
        draws.encode_all([t for t, _ in texts], row[leaf][None], row[f"{leaf}.mask"][None])
        draws.texts_cut += sum(was_cut for _, was_cut in texts)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """sentences i32[B K L], sentences.mask bool[B K]: K sentences of the record's longest caption, drawn, none twice.

    With `max_joined` over 1, each text is a run of 1 … max_joined sentences that begins at the drawn one.
    """

    config: ClassVar = "sentences"
    stage: ClassVar = "text"

    def spec(self, data: Data, batch: int) -> Spec:
        shape = (batch, data.sentences.num, data.text_len)
        return {"sentences": (shape, np.int32), "sentences.mask": (shape[:2], np.bool_)}

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        data, wanted = draws.data, draws.data.sentences
        captions = entries(record, "captions", text_ops.is_caption, "{text, lang, …}")
        texts = [
            c["text"]
            for c in captions
            if (not data.langs or c["lang"] in data.langs)
            and (not wanted.sources or c.get("source") in wanted.sources)
        ]
        found = text_ops.sentences(max(texts, key=len, default=""))
        found = [s for s in found if not draws.is_blank(s)]
        first = draws.chosen("sentences", len(found), wanted.num)
        num = [1] * len(first)
        if wanted.max_joined > 1 and draws.training:
            num = draws.rng("sentences:joined").integers(1, wanted.max_joined + 1, len(first))
        joined = [" ".join(found[i : i + n]) for i, n in zip(first, num)]
        draws.encode_all(joined, row["sentences"], row["sentences.mask"])


@dataclasses.dataclass(frozen=True)
class NegativeTexts:
    """negatives.text i32[B M L], negatives.text.mask bool[B M]: texts that do not describe the image, none twice."""

    config: ClassVar = "num_negatives"
    stage: ClassVar = "text"

    def spec(self, data: Data, batch: int) -> Spec:
        shape, leaf = (batch, data.num_negatives), "negatives.text"
        return {leaf: ((*shape, data.text_len), np.int32), f"{leaf}.mask": (shape, np.bool_)}

    def is_missing(self, record: dict, data: Data) -> bool:
        return not record.get("negatives")

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        found = entries(record, "negatives", lambda t: isinstance(t, str), "strings")
        chosen = draws.chosen("negatives.text", len(found), draws.data.num_negatives)
        texts = [found[i] for i in chosen]
        draws.encode_all(texts, row["negatives.text"], row["negatives.text.mask"])
