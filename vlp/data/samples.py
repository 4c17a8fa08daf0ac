"""One row of a batch: reads a record, fills the leaves from it, and replaces bad records."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import order, pictures, text_ops
from vlp.data.config import Data
from vlp.data.draws import REASONS, BadRecord, Draws, Row
from vlp.data.leaves import Leaf
from vlp.data.sources.combined import Concatenated

MAX_BAD_IN_A_ROW = 100


class Reader:
    """Reads the records of a source, decoded ones from a cache if `data.cache_decoded`; safe in several threads."""

    def __init__(self, data: Data, source: Any):
        self.data, self.source = data, source
        self._cache: dict[int, dict] = {}
        self._cache_left = data.cache_mb * 10**6 if data.cache_decoded else 0
        self._lock = threading.Lock()

    def decoded(self, record_id: int) -> dict:
        """Returns a record with its image decoded: u8[H, W, 3]. Do not write into it."""
        try:
            found = self.read(int(record_id))
            if isinstance(found["image"], pictures.Picture):
                found = found | {"image": found["image"].pixels()[0]}
            return found
        except (BadRecord, pictures.BadImage) as e:
            raise self.refusal(int(record_id), e) from e

    def read(self, record_id: int) -> dict:
        """Returns a record whose image is an array or a `Picture`. Raises: `BadImage`, `BadRecord`."""
        if (found := self._cache.get(record_id)) is not None:
            return found
        try:
            found = self.source[record_id]
            image = found["image"]
            if not isinstance(image, bytes | np.ndarray):
                raise TypeError(f"image is a {type(image).__name__}")
        except pictures.BadImage:  # of a source that looks at the file itself
            raise
        except Exception as e:  # by source: OSError, zlib.error, msgpack's, KeyError …
            if fault := check.machine(f"record {record_id} of {self.data.path}", e):
                raise fault from None
            raise BadRecord("unreadable", f"{type(e).__name__}: {e!s:.120}") from e
        if isinstance(image, bytes):
            found["image"] = image = pictures.Picture(image)
        if not self.data.cache_decoded:
            return found
        if isinstance(image, pictures.Picture):  # whole, whether or not there is room for it
            found["image"] = image = image.pixels()[0]
        with self._lock:
            if self._cache_left >= image.nbytes and record_id not in self._cache:
                self._cache[record_id] = found
                self._cache_left -= image.nbytes
        return found

    def refusal(self, record_id: int, e: Any) -> check.UserError:
        if isinstance(e, check.UserError):  # of the captions: it says what to do
            return e
        what = "a bad image" if isinstance(e, pictures.BadImage) else "a bad record"
        named = f" (key {self.key(record_id)!r}, {self.data.path or self.data.source})"
        where = f"record {record_id} of {self.data.split!r}{named}"
        do = "remove it or set config.data.bad_records='replace'"
        expected = (
            "an image and a caption" if e.reason != "bad_field" else "a field as its leaf reads"
        )
        return check.error(where, f"{what} ({e})", expected, do)

    def key(self, record_id: int) -> str:
        try:
            return str(self.source[record_id]["key"])
        except Exception:
            return f"record {record_id}"

    def fill(
        self,
        leaves: Sequence[tuple[int, Leaf]],
        record_id: int,
        draws: Draws,
        row: Row,
        secs: np.ndarray,
    ) -> tuple[int, int]:
        """Fills a row from the record, or from the first good one of its substitutes.

        Args:
          leaves: stage and leaf (`leaves.in_order`).
          record_id: the record that is due.
          draws: the place of the sample.
          row: by name of a leaf, a view of its array.
          secs: f64, by stage (`loader_stats.STAGES`); the seconds taken are added.

        Returns: the id of the record used, and 0 or 1 + the reason (in `REASONS`) for which the record that was due
          is not used.

        Raises: `UserError` for a bad record unless `bad_records` is "replace", and if all substitutes are bad.
        """
        used, why, why_not = record_id, 0, ""
        for attempt in range(MAX_BAD_IN_A_ROW):
            began = time.perf_counter()
            try:
                record = self.read(used)
                ended = time.perf_counter()
                secs[0] += ended - began
                draws.texts = draws.texts_cut = 0
                for stage, leaf in leaves:
                    began = ended
                    leaf.fill(record, draws, row)
                    ended = time.perf_counter()
                    secs[stage] += ended - began
                return used, why
            except (BadRecord, pictures.BadImage, text_ops.BadCaption) as e:
                if self.data.bad_records == "error":
                    raise self.refusal(used, e) from e
                why, why_not = why or 1 + REASONS.index(e.reason), f"{e!s:.120}"
                low, count = self._siblings(record_id)
                used = order.substitute(draws.position, attempt, low, count, draws.seed)
        raise check.error(
            f"record {record_id} and {MAX_BAD_IN_A_ROW} substitutes",
            "only bad ones",
            "images with captions",
            f"see why each is bad with config.data.bad_records = 'error' (last: {why_not})",
        )

    def _siblings(self, record_id: int) -> tuple[int, int]:
        """The records that may stand in for one: first id and number (those of its source)."""
        if not isinstance(self.source, Concatenated):
            return 0, len(self.source)
        ends = np.cumsum(self.source.sizes)
        k = int(np.searchsorted(ends, record_id, side="right"))
        return int(ends[k]) - self.source.sizes[k], self.source.sizes[k]
