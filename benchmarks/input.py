"""Images per second and core of the training loader, beside the one that open_clip builds on webdataset.

    python benchmarks/input.py --json FILE [--num 2000] [--epochs 3]

Both read the same tar shards, crop (0.9 … 1 of the area) to 224 px and tokenise to 77 ids; the other one is open_clip's
own `get_wds_dataset` with its transforms and tokenizer, which needs `pip install open_clip_torch torchvision pandas
webdataset==0.2.86` (open_clip 3.3 cannot read what newer ones put at the end of a shard; `pip install --target DIR` and
PYTHONPATH=DIR keep it apart). Each is a process of its own without workers or threads. They take turns, batch by batch,
so that other work on the machine meets both alike, and a batch is charged the CPU seconds of its process (user and
system), not the time on the wall: images_per_s_per_core. The first batch of each is not counted. Source images are
made: fields whose amplitude falls as 1 / f^1.2 … 1.4 as a photograph's does, JPEG quality 85, about 2 … 3 bits a pixel
(`photograph`). Shown beside: the distance of our images from Pillow's antialiased bicubic of the same crops, and the
resident memory after each epoch.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image

from vlp.core import check

SIZES = {500: (375, 500), 1024: (768, 1024)}
BATCH, TEXT_LEN, IMAGE_PX, PER_SHARD = 100, 77, 224, 500
WORDS = "a the red green old small dog cat house tree on in near street photo of two people with sky".split()
NUM_FIELDS = 24  # images are these, shifted, mirrored and dimmed


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """f32[height, width, 3] around 0: a random field with a natural spectrum and correlated colours."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1 / max(height, width)
    noise = rng.standard_normal((3, *f.shape)) + 1j * rng.standard_normal((3, *f.shape))
    x = np.fft.irfft2(noise / f ** rng.uniform(1.2, 1.4), (height, width))
    x /= x.std((1, 2), keepdims=True)
    return np.stack([x[0] + 0.3 * x[1], x[0], x[0] + 0.3 * x[2]], -1).astype(np.float32)


def make(directory: pathlib.Path, source_px: int, num: int) -> float:
    """Writes `num` images with captions as tar shards; returns the mean bits per pixel."""
    rng, (height, width), total = np.random.default_rng(source_px), SIZES[source_px], 0
    fields = [photograph(rng, height, width) for _ in range(NUM_FIELDS)]
    for shard in range(-(-num // PER_SHARD)):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * PER_SHARD, min(num, (shard + 1) * PER_SHARD)):
                shift = (int(rng.integers(height)), int(rng.integers(width)))
                field = np.roll(fields[i % NUM_FIELDS], shift, (0, 1))[:, :: rng.choice([-1, 1])]
                pixels = (field * rng.uniform(35, 60) + rng.uniform(90, 150)).clip(0, 255)
                jpeg = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(jpeg, "JPEG", quality=85)
                text = " ".join(rng.choice(WORDS, 12)).encode()
                total += len(jpeg.getvalue())
                for ending, data in (("jpg", jpeg.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{i:08d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return 8 * total / (num * height * width)


def vlp_epochs(directory: str, num: int, threads: int = 0):
    """Yields epochs, each an iterator over batches. threads: as `config.data.read_threads`."""
    from vlp.data import loader, tokenizer

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(500)]
    data = loader.Data(
        path=directory, image_px=IMAGE_PX, text_len=TEXT_LEN, langs=(), min_area_frac=0.9,
        max_aspect=4 / 3, resize="fast", bad_records="replace", read_threads=threads,
    )  # fmt: skip
    dataset = loader.open_dataset(data, tokenizer.train(texts, 64, model_type="bpe"))
    start = 0
    while True:
        yield dataset.train_iter(start=start, batch=BATCH, num_batches=num // BATCH, seed=0)
        assert not dataset.tally.bad, dataset.tally.text()
        start += num


def webdataset_epochs(directory: str, num: int):
    """Yields epochs, each an iterator over batches."""
    import torch

    torch.set_num_threads(1)
    import open_clip
    from open_clip_train.data import get_wds_dataset

    shards = sorted(str(p) for p in pathlib.Path(directory).glob("*.tar"))
    args = types.SimpleNamespace(
        train_data="::".join(shards), train_num_samples=num, dataset_resampled=False, seed=0,
        train_data_upsampling_factors=None, batch_size=BATCH, workers=0, world_size=1,
    )  # fmt: skip
    transform = open_clip.image_transform(
        IMAGE_PX,
        is_train=True,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )
    tokenize = open_clip.tokenizer.SimpleTokenizer(context_length=TEXT_LEN)
    info = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenize)
    epoch = 0
    while True:
        info.set_epoch(epoch)
        yield iter(info.dataloader)
        epoch += 1


def resident_mb() -> float:
    """This process's resident memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def distance(directory: str, num: int = 200) -> float:
    """Mean absolute difference, of 255, between our training images and Pillow's bicubic of the same crops."""
    from vlp.data import image_ops, order, sources

    source, total = sources.open_path(directory), 0.0
    options = {"min_area_frac": 0.9, "max_aspect": 4 / 3}
    for i in range(num):
        picture = image_ops.Picture(source[i]["image"])
        rngs = [order.sample_rng(0, "image", i) for _ in range(2)]
        ours = image_ops.train_image(picture, IMAGE_PX, rngs[0], resize="fast", **options)
        box, shrink = image_ops.train_box(picture.size, IMAGE_PX, rngs[1].random(8), **options)
        box = tuple(
            shrink * round(edge / shrink) for edge in box
        )  # whole pixels of what we decoded
        box = (*box[:2], *(min(e, side) for e, side in zip(box[2:], picture.size[::-1])))
        image = Image.open(io.BytesIO(source[i]["image"])).convert("RGB")
        theirs = image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC, box=box)
        total += np.abs(ours.astype(int) - np.asarray(theirs)).mean()
    return round(float(total / num), 3)


def serve(loader: str, directory: str, num: int) -> None:
    """Makes a batch for every line on standard input, and answers with its seconds and this process's memory."""
    each = {"vlp": vlp_epochs, "webdataset": webdataset_epochs}[loader](directory, num)
    batches: Iterator = iter(())
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = next(each)
            batch = next(batches)
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        assert len(image) == BATCH
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print("RESULT", json.dumps([cpu, wall, resident_mb()]), flush=True)


class Server:
    """A process that runs `serve`."""

    def __init__(self, loader: str, directory: str, num: int, errors: IO):
        command = [sys.executable, __file__, "--serve", loader, directory, "--num", str(num)]
        path = [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        )  # fmt: skip

    def batch(self) -> list[float]:
        """CPU seconds, seconds and MB of one more batch."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError("a loader's process ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(directory: str, num: int, epochs: int) -> dict[str, dict]:
    """Rates and memory of both loaders, which take turns."""
    with tempfile.TemporaryFile("w+") as errors:
        servers = {n: Server(n, directory, num, errors) for n in ("vlp", "webdataset")}
        secs = {n: np.zeros(2) for n in servers}
        memory: dict[str, list[float]] = {n: [] for n in servers}
        try:
            for step in range(epochs * (num // BATCH)):
                for name, server in servers.items():
                    *taken, mb = server.batch()
                    secs[name] += taken if step else [0, 0]
                    if (step + 1) % (num // BATCH) == 0:
                        memory[name].append(round(mb, 1))
        except RuntimeError:
            errors.seek(0)
            sys.exit(errors.read()[-4000:])
        finally:
            for server in servers.values():
                server.close()
    images = BATCH * (epochs * (num // BATCH) - 1)
    return {
        name: {
            "images_per_s_per_core": round(float(images / secs[name][0]), 1),
            "images_per_s": round(float(images / secs[name][1]), 1),
            "images": images,
            "rss_mb": memory[name],
        }
        for name in servers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--serve", nargs=2, metavar=("LOADER", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    check.output_file("--json", args.json)
    if args.serve:
        return serve(*args.serve, args.num)
    rows = []
    for source_px in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            bits = make(pathlib.Path(directory), source_px, args.num)
            shared = {"source_px": source_px, "bits_per_px": round(bits, 2)}
            far = distance(directory)
            for loader, found in compare(directory, args.num, args.epochs).items():
                rows.append({"loader": loader, **shared, **found})
                rows[-1] |= {"mean_distance_from_bicubic": far} if loader == "vlp" else {}
                print(rows[-1], flush=True)
        ours, theirs = (r["images_per_s_per_core"] for r in rows[-2:])
        print(f"{source_px} px: {ours / theirs:.2f} times as many images/s per core", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    check.run(main)
