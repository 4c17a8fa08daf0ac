"""Images per second and core of the training loader, beside the one that open_clip builds on webdataset.

    python benchmarks/input.py --make-env DIR         # once: an environment for the other loader, 1 GB
    python benchmarks/input.py --rival-python DIR/bin/python --json FILE [--num 2000] [--epochs 3]

Both read the same tar shards, crop (0.9 … 1 of the area) to 224 px and tokenise to 77 ids; the other one is open_clip's
own `get_wds_dataset` with its transforms and tokenizer, on webdataset 0.2.86 (open_clip 3.3 cannot read what newer ones
put at the end of a shard). Each is a process of its own without workers or threads. They take turns, batch by batch,
so that other work on the machine meets both alike, and a batch is charged the CPU seconds of its process (user and
system), not the time on the wall: images_per_s_per_core. The first batch of each is not counted. Source images are
made: fields whose amplitude falls as 1 / f^1.2 … 1.4 as a photograph's does, JPEG quality 85, about 2 … 3 bits a pixel
(`photograph`). Shown beside: the distance of our images from Pillow's antialiased bicubic of the same crops, and the
resident memory after each epoch.
"""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any

import bench
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
    from vlp.data import tokenizer
    from vlp.data.config import Data
    from vlp.data.dataset import open_dataset

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(500)]
    data = Data(
        path=directory, image_px=IMAGE_PX, text_len=TEXT_LEN, langs=(), min_area_frac=0.9,
        max_aspect=4 / 3, resize="fast", bad_records="replace", read_threads=threads,
    )  # fmt: skip
    dataset = open_dataset(data, tokenizer.train(texts, 64))
    start = 0
    while True:
        yield dataset.train_iter(start=start, batch=BATCH, num_batches=num // BATCH, seed=0)
        assert not dataset.loader_stats.bad, dataset.loader_stats.text()
        start += num


def webdataset_epochs(directory: str, num: int):
    """Yields epochs, each an iterator over batches."""
    import torch

    torch.set_num_threads(1)
    bench.allow_any_torchvision()
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
    from vlp.data import image_ops, order, pictures, sources

    source, total = sources.open_path(directory), 0.0
    options = {"min_area_frac": 0.9, "max_aspect": 4 / 3}
    for i in range(num):
        picture = pictures.Picture(source[i]["image"])
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
    """Makes a batch each time it is asked, and answers with its seconds and this process's memory."""
    each = {"vlp": vlp_epochs, "webdataset": webdataset_epochs}[loader](directory, num)
    batches: Iterator = iter(())

    def answer() -> bench.Row:
        nonlocal batches
        cpu, wall = time.process_time(), time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = next(each)
            batch = next(batches)
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        assert len(image) == BATCH
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu, "wall": wall, "mb": resident_mb()}

    bench.serve(answer)


def compare(directory: str, num: int, epochs: int, rival: str) -> dict[str, bench.Row]:
    """Rates and memory of both loaders, which take turns. rival: the other's interpreter. Raises bench.Failed."""
    pythons = {"vlp": sys.executable, "webdataset": rival}
    command = lambda name: (__file__, "--serve", name, directory, "--num", str(num))
    workers = {name: bench.Worker(*command(name), python=p) for name, p in pythons.items()}
    secs = {name: np.zeros(2) for name in workers}
    memory: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for step in range(epochs * (num // BATCH)):
            for name, worker in workers.items():
                found = worker.ask()
                secs[name] += [found["cpu"], found["wall"]] if step else [0, 0]
                if (step + 1) % (num // BATCH) == 0:
                    memory[name].append(found["mb"])
    finally:
        for worker in workers.values():
            worker.close()
    images = BATCH * (epochs * (num // BATCH) - 1)
    return {
        name: {
            "images_per_s_per_core": round(float(images / secs[name][0]), 1),
            "images_per_s": round(float(images / secs[name][1]), 1),
            "images": images,
            "rss_mb": memory[name][-1],
            "rss_mb_by_epoch": memory[name],
        }
        for name in workers
    }


# What the other loader needs; its process reads this file and vlp.core.check, and nothing else of vlp.
RIVAL = (
    "torch",
    "torchvision",
    "open_clip",
    "open_clip_train",
    "webdataset",
    "pandas",
    "timm",
    "PIL",
    "numpy",
)
STEPS = (  # pip's arguments: torchvision, open_clip and timm would bring a torch of their own, with CUDA's libraries
    ("torch==2.13.0", "webdataset==0.2.86", "pandas", "numpy", "pillow"),
    ("--no-deps", "torchvision", "open_clip_torch==3.3.0", "timm"),
    ("ftfy", "regex", "tqdm", "huggingface_hub", "safetensors", "pyyaml"),
)


def make_env(directory: str) -> None:
    """A virtual environment with what the other loader needs. Raises UserError where pip fails."""
    if pathlib.Path(directory).exists():
        raise check.error(
            "--make-env", repr(directory), "a directory that is not there", "name another"
        )
    python = f"{directory}/bin/python"
    for command in (
        [sys.executable, "-m", "venv", directory],
        *([python, "-m", "pip", "install", "-q", *s] for s in STEPS),
    ):
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or done.stdout.strip() or "no reason").splitlines()[-1]
            raise check.error(
                "--make-env",
                f"{' '.join(command)!r}: {why}",
                "an installation",
                "mend it, or try later",
            )
    print(f"now: python benchmarks/input.py --rival-python {python}")


def check_rival(python: str) -> None:
    """Raises UserError unless the interpreter has what the other loader needs, of the right version."""
    do = "python benchmarks/input.py --make-env DIR, then --rival-python DIR/bin/python"
    lacks = bench.missing_in(python, RIVAL)
    if lacks:
        raise check.error(
            "--rival-python", f"{python} without {', '.join(lacks)}", "open_clip's loader", do
        )
    version = bench.output(
        python, "-c", "import importlib.metadata as m; print(m.version('webdataset'))"
    )
    if version != "0.2.86":
        raise check.error("--rival-python", f"webdataset {version}", "webdataset 0.2.86", do)


COLUMNS = {
    "loader": ("loader", ""), "source_px": ("px", ""), "bits_per_px": ("bits/px", ""),
    "images_per_s_per_core": ("images/s/core", ".1f"), "images_per_s": ("images/s", ".1f"),
    "rss_mb": ("MB", ".0f"), "mean_distance_from_bicubic": ("off bicubic", ".2f"),
    "ratio": ("ratio", ".2f"),
}  # fmt: skip


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--num", type=int, default=2000, help="images, in hundreds")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--rival-python", default=sys.executable, metavar="FILE", help="with open_clip's loader"
    )
    parser.add_argument(
        "--make-env", default="", metavar="DIR", help="make such an environment, and end"
    )
    parser.add_argument("--serve", nargs=2, metavar=("LOADER", "DIR"), help=bench.HIDDEN)
    args = bench.options(parser, needs=("jax", "grain", "sentencepiece", "simplejpeg"))
    if args.serve:
        loader, folder = args.serve
        return serve(loader, folder, args.num)
    if args.make_env:
        return make_env(args.make_env)
    if args.num % BATCH or args.num * args.epochs < 2 * BATCH:
        got = f"{args.num} images × {args.epochs} epochs"
        raise check.error(
            "--num", got, f"a multiple of {BATCH}, and two batches in all", "change it"
        )
    check_rival(args.rival_python)
    rows: list[dict[str, Any]] = []
    show = bench.Lines(COLUMNS)
    for source_px in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            bits = make(pathlib.Path(directory), source_px, args.num)
            shared = {"source_px": source_px, "bits_per_px": round(bits, 2)}
            far = distance(directory, min(args.num, 200))
            found = compare(directory, args.num, args.epochs, args.rival_python)
        ours, theirs = (found[n]["images_per_s_per_core"] for n in ("vlp", "webdataset"))
        found["vlp"] |= {"mean_distance_from_bicubic": far, "ratio": ours / theirs}
        for loader, row in found.items():
            rows.append({"loader": loader, **shared, **row})
            show(rows[-1])
        bench.save(args.json, rows)


if __name__ == "__main__":
    bench.run(main)
