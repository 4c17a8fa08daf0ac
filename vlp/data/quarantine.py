"""Bad records of a run: counted by reason, listed in a file that `Data.skip` reads, limited by `max_bad_frac`."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlp.core import check
from vlp.core.appended import Appended
from vlp.data import order
from vlp.data.draws import REASONS
from vlp.data.loader_stats import BAD, STATS
from vlp.data.sources.combined import Concatenated, Without

log = logging.getLogger(__name__)
MIN_SEEN = 1000  # max_bad_frac is a share of the samples seen, or of this many if fewer were seen


def watched(
    batches: Iterator[dict], dataset: Any, seed: int, file: Appended | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches without the workers' counters, which are added to `dataset.loader_stats`.

    Args:
      batches: as made by workers, with the leaves `BAD` and `STATS`.
      dataset: the `Dataset` that they come from.
      seed: of the order, to find the original record at a position.
      file: to which a line is added for every replaced record (default: no file).

    Raises: `UserError` once more than `max_bad_frac` of the samples were replaced.
    """
    stats, listed = dataset.loader_stats, set()
    for batch in batches:
        bad_b = batch.pop(BAD)
        stats.add(bad_b, batch.pop(STATS))
        for row in np.flatnonzero(bad_b):
            position = int(order.join_words(batch["index"][row : row + 1])[0])
            record, reason = int(dataset.record_ids(position, 1, seed)[0]), REASONS[bad_b[row] - 1]
            stats.bad[reason] += 1
            if record not in listed:
                listed.add(record)
                key = dataset.key(record)
                if len(worst := stats.worst.setdefault(reason, [])) < 3:
                    worst.append(key)
                log.warning("record %d (%s) replaced: %s", record, key, reason)
                if file is not None:
                    _append(file, dataset.source, record, {"key": key, "reason": reason})
        num, most = stats.bad.total(), dataset.data.max_bad_frac
        if num > most * max(stats.seen, MIN_SEEN):
            if file is not None:
                file.flush()
            raise check.error(
                "data",
                f"{num} bad records of {stats.seen}: {stats.text()}",
                f"at most config.data.max_bad_frac = {most}",
                f"repair the data{f' (see {file.path})' if file else ''} or raise it",
            )
        yield batch


def _append(file: Appended, source: Any, record: int, row: dict) -> None:
    """Appends a line: the record as the innermost source counts it, with that source's fingerprint."""
    if isinstance(source, Concatenated):
        k = int(np.searchsorted(np.cumsum(source.sizes), record, side="right"))
        source, record = source.parts[k], record - sum(source.sizes[:k])
    if isinstance(source, Without):
        record = int(order.skipping(np.array([record]), source.skipped)[0])
        source = source.source
    line = {"record": record, **row, "fingerprint": source.fingerprint}
    file.write(json.dumps(line) + "\n")
