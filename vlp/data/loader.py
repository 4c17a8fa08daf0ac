"""Batches: the config section `data`, and the `Dataset` from stream positions to numpy arrays.

An element of the pipeline is one host's rows of one global batch, computed from its number alone.
So hosts, workers and threads change the speed and never the content, nothing is dropped, and a run
resumes anywhere by passing `start`. With workers > 0 a script needs the usual `if __name__ ==
"__main__":` guard, as with any spawned process. Not here: the order (order.py), what a record is
(records.py), device arrays (core/mesh.py).
"""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vlp.core import check
from vlp.data import SOURCES, image_ops, order, text_ops
from vlp.data import tokenizer as tokenizers

log = logging.getLogger(__name__)
BAD_IMAGES = ("error", "replace")
MAX_BAD_IN_A_ROW = 100


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read and how it is prepared."""

    source: str = "records"  # one of vlp.data.SOURCES
    path: str = ""  # directory of the records
    split: str = "train"
    tokenizer: str = ""  # path of a model; "" = the source's own
    num_records: int = 512  # source "shapes" only
    shuffle: bool = True
    group_by: str = ""  # a field of the records: an epoch visits each of its values once
    image_px: int = 64
    text_len: int = 16  # tokens, with bos and eos
    captions: str = "first"  # first | uniform | all (then num_captions of them, cycled)
    num_captions: int = 1
    langs: tuple[str, ...] = ("en",)  # () = every language
    shorten: str = "truncate"  # how training texts are cut to text_len (text_ops.SHORTEN)
    min_area_frac: float = 0.6  # the crop's share of the area
    max_area_frac: float = 1.0
    max_aspect: float = 1.25
    translate_frac: float = 0.0  # white border that crops may include, as a share of the side
    flip: bool = False
    jitter: float = 0.0  # largest relative change of brightness, contrast, saturation
    resize: str = "bicubic"  # one of image_ops.FILTERS
    bad_images: str = (
        "error"  # or "replace": by the next record, as `record` in the batch then shows
    )
    cache_decoded: bool = False  # keep decoded images in memory (once per worker process)
    cache_mb: int = 1024  # … up to this size, counted as image bytes
    workers: int = 0  # processes; 0 = threads of this process only
    read_threads: int = 2  # threads that make batches, per process; 0 = none, made when asked for
    prefetch: int = 4  # batches ready ahead of the consumer, per process


def open_dataset(data: Data, tokenizer: tokenizers.Tokenizer | None = None) -> "Dataset":
    """Opens and checks the data; `tokenizer` overrides the config's (a checkpoint's own, say)."""
    if data.source not in SOURCES:
        raise check.unknown("config.data.source", data.source, SOURCES)
    _check(data)
    source = SOURCES[data.source](data)
    if tokenizer is None:
        tokenizer = tokenizers.load(data.tokenizer) if data.tokenizer else source.tokenizer()
    return Dataset(data, source, tokenizer)


def _check(data: Data) -> None:
    image_ops.check_filter("config.data.resize", data.resize)
    enums = (
        ("captions", text_ops.POLICIES),
        ("shorten", text_ops.SHORTEN),
        ("bad_images", BAD_IMAGES),
    )
    for field, known in enums:
        if getattr(data, field) not in known:
            raise check.unknown(f"config.data.{field}", getattr(data, field), known)
    bounds = (
        ("min_area_frac", 0 < data.min_area_frac <= data.max_area_frac, "in (0, max_area_frac]"),
        ("max_area_frac", data.max_area_frac <= 1, "at most 1"),
        ("max_aspect", data.max_aspect >= 1, "at least 1"),
        ("translate_frac", 0 <= data.translate_frac <= 1, "in [0, 1]"),
        ("jitter", 0 <= data.jitter < 1, "in [0, 1)"),
        ("image_px", data.image_px >= 1, "at least 1"),
        ("text_len", data.text_len >= 3, "at least 3 (bos, a piece, eos)"),
        ("num_captions", data.num_captions >= 1, "at least 1"),
        ("cache_mb", data.cache_mb >= 0, "at least 0"),
        ("workers", data.workers >= 0, "at least 0"),
        ("read_threads", data.read_threads >= 0, "at least 0"),
        ("prefetch", data.prefetch >= 1, "at least 1"),
    )
    for field, good, expected in bounds:
        if not good:
            raise check.error(
                f"config.data.{field}", getattr(data, field), expected, "change the config"
            )


class Dataset:
    """One split, ready to be read in batches: picklable, safe to use from several threads.

    A batch is a dict of numpy arrays, b rows of this host:
      image   u8[b, R, R, 3]
      text    i32[b, L]      [bos] pieces [eos] pads; i32[b, K, L] with captions="all"
      mask    bool[b]        True; False on the rows that fill the last batch of an evaluation
      index   u32[b, 2]      the sample's position in the global stream, as (high, low) words
      record  u32[b, 2]      its record id, likewise (`order.join_words` joins them)
    """

    def __init__(self, data: Data, source, tokenizer: tokenizers.Tokenizer):
        self.data, self.source, self.tokenizer = data, source, tokenizer
        self.num_records: int = len(source)
        self.fingerprint: str = source.fingerprint
        self._groups = self._group(data.group_by) if data.group_by else None
        self._cache: dict[int, dict] = {}
        self._cache_left = data.cache_mb * 10**6 if data.cache_decoded else 0
        self._lock = threading.Lock()

    def __reduce__(self):  # the cache stays behind; workers fill their own
        return Dataset, (self.data, self.source, self.tokenizer)

    def _group(self, field: str) -> order.Groups:
        """Reads that field of every record: meant for data that is read in seconds."""
        if field not in self.source[0]:
            known = sorted(k for k, v in self.source[0].items() if isinstance(v, str))
            raise check.unknown("config.data.group_by", field, known)
        return order.Groups.of([self.source[i][field] for i in range(self.num_records)])

    @property
    def epoch_len(self) -> int:
        """Samples in an epoch: records, or groups of them."""
        return self._groups.num if self._groups else self.num_records

    def record_ids(self, start: int, count: int, seed: int) -> np.ndarray:
        """Returns i64[count], the records at stream positions start … start + count - 1."""
        if self._groups:
            return self._groups.record_ids(start, count, seed, self.data.shuffle)
        return order.record_ids(start, count, self.num_records, seed, self.data.shuffle)

    def record(self, record_id: int) -> dict:
        """Returns a record with its image decoded: u8[H, W, 3]. Do not write into it."""
        try:
            return self._read(int(record_id))
        except image_ops.BadImage as e:
            raise check.error(
                f"record {record_id} of {self.data.split!r}",
                f"a bad image ({e})",
                "an image",
                "remove it or set config.data.bad_images='replace'",
            ) from e

    def _read(self, record_id: int) -> dict:
        if (found := self._cache.get(record_id)) is not None:
            return found
        found = self.source[record_id]
        if isinstance(found["image"], bytes):
            found["image"] = image_ops.decode(found["image"])
        if self._cache_left >= (size := found["image"].nbytes):
            with self._lock:
                if record_id not in self._cache:
                    self._cache[record_id] = found
                    self._cache_left -= size
        return found

    def reference(self, record_id: int) -> str:
        """The caption that evaluations compare with: the first in the wanted languages."""
        return _texts(self.record(record_id), self.data, "first", None)[0]

    def keys(self, record_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the keys of the records."""
        return [self.source[int(i)]["key"] for i in record_ids]

    def batch_at(
        self, start: int, batch: int, seed: int, rows: range | slice | None = None
    ) -> dict[str, np.ndarray]:
        """Returns rows (default: all) of the global batch that begins at stream position `start`.

        A pure function of its arguments and the data. Image and caption draws depend on (seed,
        stream position).
        """
        rows = range(batch) if rows is None else rows
        rows = range(batch)[rows] if isinstance(rows, slice) else rows
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= batch:
            raise check.error("rows", rows, f"a block of 0 … {batch}", "use order.host_rows")
        first = start + rows.start
        ids_b = self.record_ids(first, len(rows), seed)
        return self._collate(first, ids_b, functools.partial(_train_sample, seed))

    def train_iter(
        self,
        *,
        start: int,
        batch: int,
        num_batches: int,
        seed: int,
        host: int = 0,
        num_hosts: int = 1,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's rows of `num_batches` global batches from stream position `start` on.

        `start` is the number of samples seen so far and need not be a multiple of anything.
        """
        rows = order.host_rows(batch, host, num_hosts)
        return _iterate(_TrainBatch(self, start, batch, seed, rows), num_batches, self.data)

    def num_eval_batches(self, batch: int) -> int:
        """Returns how many batches `eval_iter` yields, on every host."""
        return -(-self.num_records // batch)

    def eval_iter(
        self, batch: int, host: int = 0, num_hosts: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields one pass in record order, without augmentation; "uniform" captions become "first".

        Every host yields equally many full batches: rows past the end repeat the last record and
        have mask False.
        """
        rows = order.host_rows(batch, host, num_hosts)
        quiet = dataclasses.replace(
            self.data, workers=0
        )  # starting processes costs more than one pass
        return _iterate(_EvalBatch(self, batch, rows), self.num_eval_batches(batch), quiet)

    def eval_batch(
        self, number: int, batch: int, rows: range | None = None
    ) -> dict[str, np.ndarray]:
        """Returns rows of evaluation batch `number`: what `eval_iter` yields."""
        rows = range(batch) if rows is None else rows
        first = number * batch + rows.start
        positions_b = np.arange(first, first + len(rows))
        ids_b = np.minimum(positions_b, self.num_records - 1)
        out = self._collate(first, ids_b, _eval_sample)
        out["mask"][:] = positions_b < self.num_records
        return out

    def _collate(self, first: int, ids_b: np.ndarray, prepare: Callable) -> dict[str, np.ndarray]:
        """Prepares every sample straight into one preallocated batch."""
        b, data = len(ids_b), self.data
        caption_axes = (data.num_captions,) if data.captions == "all" else ()
        image_bRRC = np.empty((b, data.image_px, data.image_px, 3), np.uint8)
        text_bKL = np.empty((b, *caption_axes, data.text_len), np.int32)
        ids_b = ids_b.copy()
        for row, record_id in enumerate(ids_b.tolist()):
            record, ids_b[row] = self._good_record(record_id)
            image_bRRC[row], texts = prepare(record, data, first + row)
            ids_KL = [self.tokenizer.encode(t, data.text_len) for t in texts]
            text_bKL[row] = ids_KL if caption_axes else ids_KL[0]
        return {
            "image": image_bRRC,
            "text": text_bKL,
            "mask": np.ones(b, bool),
            "index": order.split_words(np.arange(first, first + b)),
            "record": order.split_words(ids_b),
        }

    def _good_record(self, record_id: int) -> tuple[dict, int]:
        """Returns the record and its id; with bad_images="replace", of the next good one."""
        if self.data.bad_images == "error":
            return self.record(record_id), record_id
        for step in range(min(self.num_records, MAX_BAD_IN_A_ROW)):
            other = (int(record_id) + step) % self.num_records
            try:
                return self._read(other), other
            except image_ops.BadImage as e:
                log.warning("record %d replaced by the next: %s", other, e)
        raise check.error(
            f"records from {record_id}", "only bad images", "images", "run `vlp data verify DIR`"
        )


def _train_sample(seed: int, record: dict, data: Data, position: int) -> tuple[np.ndarray, list]:
    """Returns the image and the caption texts of the training sample at a stream position."""
    image_RRC = image_ops.train_image(
        record["image"],
        data.image_px,
        order.sample_rng(seed, "image", position),
        min_area_frac=data.min_area_frac,
        max_area_frac=data.max_area_frac,
        max_aspect=data.max_aspect,
        translate_frac=data.translate_frac,
        flip=data.flip,
        jitter=data.jitter,
        resize=data.resize,
    )
    rng = order.sample_rng(seed, "text", position) if data.captions == "uniform" else None
    texts = _texts(record, data, data.captions, rng)
    if data.shorten != "truncate":  # which the tokenizer does
        rng = order.sample_rng(seed, "shorten", position)
        num_words = data.text_len - 2  # beside bos and eos
        texts = [text_ops.shorten(t, num_words, data.shorten, rng) for t in texts]
    return image_RRC, texts


def _eval_sample(record: dict, data: Data, position: int) -> tuple[np.ndarray, list]:
    """Returns the image and the caption texts of a record as evaluations see it."""
    del position  # nothing is drawn
    image_RRC = image_ops.eval_image(record["image"], data.image_px, resize=data.resize)
    return image_RRC, _texts(record, data, "all" if data.captions == "all" else "first", None)


def _texts(record: dict, data: Data, policy: str, rng: np.random.Generator | None) -> list[str]:
    return text_ops.choose(
        record["captions"],
        policy=policy,
        langs=data.langs,
        num=data.num_captions,
        rng=rng,
        where=f"record {record['key']!r}",
    )


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """Number of a batch since `start` → the host's rows of it."""

    dataset: Dataset
    start: int
    batch: int
    seed: int
    rows: range

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        first = self.start + int(number) * self.batch
        return self.dataset.batch_at(first, self.batch, self.seed, self.rows)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """Number of an evaluation batch → the host's rows of it."""

    dataset: Dataset
    batch: int
    rows: range

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        return self.dataset.eval_batch(int(number), self.batch, self.rows)


def _iterate(make: Callable[[int], dict], num_batches: int, data: Data) -> Iterator[dict]:
    """Yields make(0), make(1) … in order, made ahead by Grain's threads and processes."""
    if num_batches <= 0:
        return iter(())
    import grain  # here, because it takes seconds and `vlp data` does not need it
    from absl import flags

    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain's workers refuse to start otherwise (notebooks, scripts)
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(
        num_threads=data.read_threads,
        prefetch_buffer_size=data.prefetch if data.read_threads else 0,
    )
    batches = grain.MapDataset.range(num_batches).map(make).to_iter_dataset(options)
    if data.workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=min(data.workers, num_batches), per_worker_buffer_size=data.prefetch
            )
        )
        # Grain hands out views of shared memory that must not outlive it: copies are safe to keep.
        return ({k: np.array(v) for k, v in batch.items()} for batch in batches)
    return iter(batches)
