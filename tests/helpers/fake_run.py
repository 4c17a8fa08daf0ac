"""A workdir as `vlp train` leaves it, with invented but plausible numbers and drawn pictures."""

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from vlp.report import load

COLORS = {
    "red": (214, 58, 52),
    "blue": (46, 98, 205),
    "green": (35, 150, 92),
    "yellow": (240, 190, 40),
}
SHAPES = ("circle", "square", "triangle")
BATCH = 256


def write(
    path: Path,
    *,
    num_rows: int = 400,
    two_stages: bool = True,
    artefacts: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a workdir of `num_rows` training rows and one evaluation every tenth of them."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    rows = [row for i in range(1, num_rows + 1) for row in _rows(rng, i, num_rows, two_stages)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (path / "versions.json").write_text(json.dumps(VERSIONS))
    if artefacts:
        (path / "evals").mkdir(exist_ok=True)
        step = rows[-1]["step"]
        for name, value in (
            ("retrieval_test", {"kind": "retrieval", "step": step, "queries": _queries(rng)}),
            ("captions_test", {"kind": "captions", "step": step, "items": _items(rng)}),
            ("zeroshot_shape_test", {"kind": "zeroshot", "step": step} | ZEROSHOT),
        ):
            (path / "evals" / f"{name}.json").write_text(json.dumps(value))
    return path


def metrics(path: Path, *rows: dict, tail: str = "") -> load.Run:
    """Writes a workdir that has only these rows of metrics.jsonl, then `tail`, and reads it."""
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return load.load(path)


def train_row(step: int, **values: object) -> dict:
    """Returns a row of training."""
    return {"kind": "train", "step": step, "samples": 8 * step, "stage": "main"} | values


ZEROSHOT = {
    "label": "shape",
    "split": "test",
    "classes": list(SHAPES),
    "confusion": [[30, 3, 1], [2, 28, 4], [0, 5, 27]],
}
CONFIG = {
    "name": "coca-emoji-S16",
    "seed": 0,
    "batch": BATCH,
    "objective": {"name": "coca", "caption_weight": 2.0, "contrastive_weight": 1.0},
    "model": {
        "name": "two_tower",
        "width": 384,
        "depth": 12,
        "image": {"patch_px": 16, "pool": "attention"},
    },
    "data": [
        {
            "name": "webdataset",
            "path": "data/emoji/{0..7}.tar",
            "attribution": "OpenMoji, CC BY-SA 4.0 (https://openmoji.org)",
        },
    ],
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 200, "wd": 0.1, "b1": 0.9, "b2": 0.98},
    "stages": [
        {"name": "masked", "share": 0.8, "keep_ratio": 0.5},
        {"name": "unmasked", "share": 0.2, "keep_ratio": 1.0},
    ],
    "evals": {"retrieval": {"every_steps": 400}, "captions": {"every_steps": 400}},
}
VERSIONS = {
    "python": "3.11.7",
    "jax": "0.10.2",
    "vlp": "0.1.0",
    "git": "3f2c9a1 (clean)",
    "platform": "gpu",
    "devices": ["NVIDIA H100 80GB HBM3"] * 4,
}


def _rows(rng: np.random.Generator, i: int, num: int, two_stages: bool) -> list[dict]:
    at, step = i / num, 10 * i
    tuned = two_stages and at > 0.8

    def noise(scale: float) -> float:
        return float(rng.normal(0, scale))

    quality = 1 - np.exp(-4 * at) + (0.03 if tuned else 0)
    con = 5.55 * (1 - 0.86 * quality) + noise(0.08)
    cap = 4.6 * np.exp(-5 * at) + 1.35 - (0.1 if tuned else 0) + noise(0.05)
    common = {
        "step": step,
        "samples": step * BATCH,
        "stage": "unmasked" if tuned else "masked" if two_stages else "main",
    }
    train = common | {
        "kind": "train",
        "loss": con + 2 * cap,
        "contrastive": con,
        "caption": cap,
        "contrastive/minus_log_batch": con - float(np.log(BATCH)),
        "contrastive/retrieval@1": float(np.clip(0.9 * quality + noise(0.02), 0, 1)),
        "contrastive/retrieval@5": float(np.clip(0.97 * min(1, 1.3 * quality) + noise(0.01), 0, 1)),
        "caption/accuracy": float(np.clip(0.72 * quality + noise(0.01), 0, 1)),
        "lr": 1e-3 * min(1, at / 0.05) * 0.5 * (1 + np.cos(np.pi * at)),
        "grad_norm": float(
            np.exp(noise(0.25)) * (0.6 + 6 * np.exp(-9 * at)) * (18 if i == 233 else 1)
        ),
        "update_norm": float(np.exp(noise(0.1)) * (0.02 + 0.1 * (1 - at))),
        "logit_scale": 14.3 + 40 * quality,
        "time/examples_per_s": (2900 if tuned else 5200)
        * (1 + noise(0.02))
        * (0.3 if i == 1 else 1),
        "time/data_wait_frac": float(np.clip(0.03 + noise(0.01), 0, 1)),
        "time/elapsed_s": 2.1 * step,
    }
    if i % max(1, num // 10) and i != num:
        return [train]
    both = {"i2t": 0.46 * quality, "t2i": 0.41 * quality}
    recalls = {
        f"{d}/R@{k}": min(1.0, q * g)
        for d, q in both.items()
        for k, g in ((1, 1), (5, 1.6), (10, 1.9))
    }
    ranks = {
        f"{d}/median_rank": float(np.ceil(1 + 400 * np.exp(-9 * at) / (q + 0.1)))
        for d, q in both.items()
    }
    held_out = {"kind": "eval", "split": "test"} | common
    return [
        train,
        held_out | {"eval": "retrieval", "num": 1000} | recalls | ranks | {"time/eval_s": 3.1},
        held_out
        | {
            "eval": "captions",
            "caption_loss": float(cap + 0.12),
            "caption_loss_shuffled": float(cap + 0.12 + 2.4 * quality),
            "caption_gap_se": 0.04,
            "num": 1000,
            "exact_match": 0.38 * quality,
        },
    ]


def picture(color: str, shape: str, px: int = 64) -> str:
    """Returns a data URI of one coloured shape on white."""
    y, x = np.mgrid[0:px, 0:px] / (px - 1) * 2 - 1
    inside = {
        "circle": x**2 + y**2 < 0.5,
        "square": np.maximum(abs(x), abs(y)) < 0.62,
        "triangle": (y < 0.6) & (y > 2.2 * abs(x) - 0.8),
    }[shape]
    rgb = np.where(inside[..., None], COLORS[color], 248).astype(np.uint8)
    raw = b"".join(b"\0" + line.tobytes() for line in rgb)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", px, px, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


_THINGS = [(c, s) for c in COLORS for s in SHAPES]


def _caption(thing: tuple[str, str]) -> str:
    return f"a {thing[0]} {thing[1]} in the middle of a plain white page"


def _queries(rng: np.random.Generator) -> list[dict]:
    out = []
    for n, thing in enumerate(_THINGS[:8]):
        others = [t for t in _THINGS if t != thing]
        ranks = (
            [1, 1]
            if n % 3 == 0
            else [int(rng.integers(1, 4)), 27 if n == 4 else int(rng.integers(1, 6))]
        )
        lists = []
        for rank in ranks:
            order = [others[j] for j in rng.permutation(len(others))]
            order.insert(rank - 1, thing) if rank <= 5 else None
            scores = np.sort(rng.uniform(0.1, 0.42, 5))[::-1]
            lists.append(
                [(t, float(s), t == thing) for t, s in zip(order[:5], scores, strict=True)]
            )
        out.append(
            {
                "image": picture(*thing),
                "caption": _caption(thing),
                "key": f"shapes/{n:06d}",
                "rank_i2t": ranks[0],
                "rank_t2i": ranks[1],
                "top_texts": [
                    {"caption": _caption(t), "score": s, "right": r} for t, s, r in lists[0]
                ],
                "top_images": [
                    {"image": picture(*t), "caption": _caption(t), "score": s, "right": r}
                    for t, s, r in lists[1]
                ],
            }
        )
    return out


def _items(rng: np.random.Generator) -> list[dict]:
    out = []
    for n, thing in enumerate(_THINGS[:9]):
        said = thing if n % 2 == 0 else _THINGS[int(rng.integers(len(_THINGS)))]
        out.append(
            {
                "image": picture(*thing),
                "caption": _caption(thing),
                "generated": _caption(said),
                "key": f"shapes/{n:06d}",
            }
        )
    return out
