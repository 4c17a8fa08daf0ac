"""Makes batches ahead of the consumer, in threads and in Grain's worker processes; restarts workers that are killed."""

import atexit
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import processes
from vlp.data.config import Data

log = logging.getLogger(__name__)


def iterate(make: Callable[[int], dict], num_batches: int, data: Data) -> Iterator[dict]:
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
    batches = lambda first: (
        grain.MapDataset.range(first, num_batches).map(make).to_iter_dataset(options)
    )
    if not data.workers:
        return iter(batches(0))

    def made_by_workers(first: int) -> Iterator[dict]:
        num = min(data.workers, num_batches - first)
        workers = grain.MultiprocessingOptions(
            num_workers=num, per_worker_buffer_size=data.prefetch
        )
        start = batches(first).mp_prefetch(workers, worker_init_fn=processes.serve_run)
        return _copies(start)

    return _restarted(made_by_workers)


def _restarted(start: Callable[[int], Iterator[dict]]) -> Iterator[dict]:
    """Yields what start(0) yields; if a worker process is killed after n batches, continues with start(n).

    Raises: `check.Failed` if a worker is killed twice without a batch in between.
    """
    done, died_at = 0, -1
    while True:
        try:
            for batch in start(done):
                yield batch
                done += 1
            return
        except RuntimeError as e:
            found = re.search(r"process was terminated unexpectedly with exit code (-?\d+)", str(e))
            if found is None:
                raise
            why = {"-9": "killed, probably out of memory", "-7": "/dev/shm is full"}
            code = f"exit code {found[1]}" + (f": {why[found[1]]}" if found[1] in why else "")
            if done == died_at:
                do = "give it more memory, or lower config.data.workers, prefetch or cache_mb"
                text = (
                    f"data: got a worker process that died twice ({code}), expected batches; {do}"
                )
                raise check.Failed(text) from e
            log.warning("data: a worker process died (%s); all are started again", code)
            died_at = done


def _copies(batches: Iterable[dict]) -> Iterator[dict]:
    """Grain hands out views of shared memory that must not outlive it: copies are safe to keep."""
    copy = lambda batch: {k: np.array(v) for k, v in batch.items()}
    with processes.without_main():  # Grain pickles by value what a script defines
        iterator: Any = iter(batches)
        first = copy(next(iterator))
    atexit.register(iterator.close)  # a script may end in the midst of it
    try:
        yield first
        yield from map(copy, iterator)
    finally:
        atexit.unregister(iterator.close)
        iterator.close()
