"""Images per second and core of the training loader, beside the one that open_clip builds on webdataset.

    python benchmarks/input.py --json FILE [--num 2000] [--epochs 3]

Both read the same tar shards, crop (0.9 … 1 of the area) to 224 px and tokenise to 77 ids; the other one is open_clip's
own `get_wds_dataset` with its transforms and tokenizer, which needs `pip install open_clip_torch torchvision pandas
webdataset==0.2.86` (open_clip 3.3 cannot read what newer ones put at the end of a shard).
Each runs alone in a process of its own without workers, and is charged the CPU seconds of all its threads from its
second batch on: other work on the machine does not count. Source images are made: fields whose amplitude falls as
1 / f^1.2 … 1.4 as a photograph's does, JPEG quality 85, about 2 … 3 bits a pixel (`photograph`). Shown beside: the
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

import numpy as np
from PIL import Image

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


def vlp_epochs(directory: str, num: int):
    """Yields epochs, each an iterator over batches."""
    from vlp.data import loader, tokenizer

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(500)]
    data = loader.Data(
        path=directory, image_px=IMAGE_PX, text_len=TEXT_LEN, langs=(), min_area_frac=0.9,
        max_aspect=4 / 3, resize="area", bad_records="replace", read_threads=1, prefetch=2,
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
    # torchvision's compiled operators are not needed here, but their schemas are when it is imported.
    schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass  # the installed torchvision brings it
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


def measure(loader: str, directory: str, num: int, epochs: int) -> dict:
    """Reads `epochs` epochs and returns the rates and the memory after each."""
    each = {"vlp": vlp_epochs, "webdataset": webdataset_epochs}[loader](directory, num)
    images, memory, cpu, wall = 0, [], None, None
    for _ in range(epochs):
        for batch in next(each):
            image = batch["image"] if isinstance(batch, dict) else batch[0]
            assert len(image) == BATCH
            if cpu is None:
                cpu, wall = time.process_time(), time.perf_counter()
            else:
                images += BATCH
        memory.append(resident_mb())
    return {
        "images_per_s_per_core": round(images / (time.process_time() - cpu), 1),
        "images_per_s": round(images / (time.perf_counter() - wall), 1),
        "images": images,
        "rss_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("LOADER", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT", json.dumps(measure(*args.one, args.num, args.epochs)))
        return
    rows = []
    for source_px in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            bits = make(pathlib.Path(directory), source_px, args.num)
            for loader in ("vlp", "webdataset"):
                command = [sys.executable, __file__, "--one", loader, directory]
                command += ["--num", str(args.num), "--epochs", str(args.epochs)]
                env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                if done.returncode:
                    sys.exit(done.stderr)
                result = done.stdout.split("RESULT ")[1]
                rows.append(
                    {
                        "loader": loader,
                        "source_px": source_px,
                        "bits_per_px": round(bits, 2),
                        **json.loads(result),
                    }
                )
                print(rows[-1], flush=True)
        ratio = rows[-2]["images_per_s_per_core"] / rows[-1]["images_per_s_per_core"]
        print(f"{source_px} px: {ratio:.2f} times as fast", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
