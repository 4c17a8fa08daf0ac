"""`vlp data bench`: images per second of each stage on one core, and which one limits."""

import contextlib
import time

from vlp.core import check
from vlp.data import order, pictures
from vlp.data.dataset import Dataset
from vlp.data.draws import augmented


def stages(dataset: Dataset, num_images: int) -> dict[str, float]:
    """Returns images/s of one thread for read, image and text, and through all three ("all").

    The stages run one after the other on the records that training would read first. Decoding and
    cropping are one stage, because a JPEG is decoded at the scale that its crop needs. Bad records
    cost what they cost and count as read.
    """
    data = dataset.data
    ids = dataset.record_ids(0, num_images, 0).tolist()
    rows = []
    begin = time.perf_counter()
    for i in ids:
        try:
            rows.append(dataset.source[i])
        except check.UserError:
            raise  # a file that cannot be read is no property of the record
        except ValueError:
            pass  # a bad record: `BadImage`, or a row that does not parse
    read_end = time.perf_counter()
    for position, row in enumerate(rows):
        image = row["image"]
        with contextlib.suppress(pictures.BadImage):
            picture = pictures.Picture(image) if isinstance(image, bytes) else image
            augmented(picture, data, order.sample_rng(0, "image", position))
    image_end = time.perf_counter()
    for caption in (c for row in rows for c in row["captions"][:1]):
        dataset.tokenizer.encode(caption["text"], data.text_len)
    end = time.perf_counter()
    secs = {
        "read": read_end - begin,
        "image": image_end - read_end,
        "text": end - image_end,
        "all": end - begin,
    }
    return {stage: num_images / max(s, 1e-9) for stage, s in secs.items()}


def end_to_end(dataset: Dataset, num_images: int, batch: int) -> float:
    """Returns images/s of the loader as configured (its threads and processes), after one batch."""
    num_batches = max(1, num_images // batch)
    batches = dataset.train_iter(start=0, batch=batch, num_batches=num_batches + 1, seed=0)
    next(batches)
    begin = time.perf_counter()
    for _ in batches:
        pass
    return num_batches * batch / max(time.perf_counter() - begin, 1e-9)
