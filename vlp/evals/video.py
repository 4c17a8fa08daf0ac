"""Video-text retrieval with an image model: some frames of each clip, pooled."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vlp.core import check, interrupt, local
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.data import pictures
from vlp.data.draws import Draws
from vlp.evals import embed, ranks
from vlp.evals import io as ios

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ANIMATED = (".gif", ".webp", ".png")
POOLS = ("mean", "attention")


@dataclasses.dataclass(frozen=True)
class Video:
    """Retrieval among clips, both ways, by the metrics of `Retrieval`; every caption is a query of its own.

    path: a folder with one entry a clip: a sub-folder of frames, in order of their names, or an animated GIF, WebP or
    PNG; captions are the lines of <clip>.txt beside it. frames: how many are taken of each, evenly spaced (the middles
    of as many equal parts). pool: "mean": of the frames' unit embeddings, normalised; "attention": the model's poolers
    read the tokens of all frames at once (CoCa, arXiv:2205.01917, §3.3). batch: clips at a time. split: only a name.
    """

    reads_dataset: ClassVar = False
    path: str
    frames: int = 8
    pool: str = "mean"
    split: str = "video"
    batch: int = 8
    every_steps: int = 0
    tile: int = 4096

    def __post_init__(self) -> None:
        where = "config.evals: video"
        if self.pool not in POOLS:
            raise check.unknown(f"{where}.pool", self.pool, POOLS)
        rules = {"frames": (1 <= self.frames <= 2**10, "in 1 … 1,024")}
        check.bounds(where, self, rules | {"tile": ranks.rule(self.tile)})

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError for a folder without clips, or a clip without captions."""
        clips(self.path, f"{where}.path")

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        if self.pool == "attention" and getattr(apply.model, "poolers", None) is None:
            where, do = "config.evals: video.pool", "use 'mean'"
            raise check.error(where, "'attention'", "a model with attentional poolers", do)
        some = jnp.concatenate([image[: self.batch]] * self.frames)
        return pooled(apply, some, frames=self.frames, pool=self.pool), embed.text(apply, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        found = clips(self.path, "config.evals: video.path")
        run = apply.jit(pooled, frames=self.frames, pool=self.pool)
        mine_b = local.indices(self.batch, mesh)
        parts = []
        for start in range(0, len(found), self.batch):
            interrupt.poll()
            places_b = np.minimum(start + mine_b, len(found) - 1).tolist()
            rows = np.concatenate([self.pixels(found[k], io) for k in places_b])
            image = meshes.to_global({"image": rows}, mesh)["image"]
            parts.append(meshes.to_host(run(image))[: len(found) - start])
        owner_M = np.array([k for k, clip in enumerate(found) for _ in clip.captions])
        texts = (t for clip in found for t in clip.captions)
        ids = (io.tokenizer.encode(text, io.data.text_len) for text in texts)
        zt_ME = embed.texts(apply, ids, self.batch, mesh)
        both = ranks.ranks(np.concatenate(parts), zt_ME, owner_M, mesh, self.tile)
        lines = [f"{clip.name}\t{text}" for clip in found for text in clip.captions]
        where = {"split": self.split, "num": len(found), "num_captions": len(owner_M)}
        where |= {"fingerprint": ios.digest(lines), "preprocessing": ios.preprocessing(io.data)}
        where |= {"frames": self.frames, "pool": self.pool}
        yield from ranks.results(both, where)

    def pixels(self, clip: Clip, io: ios.IO) -> np.ndarray:
        """Returns the frames of a clip, u8[T R R 3], prepared as the checkpoint's images."""
        draws = Draws(io.data, io.tokenizer, 0, 0, 0, training=False)
        rng = np.random.default_rng(0)  # evaluations draw nothing
        return np.stack([draws.image(frame, rng) for frame in clip.frames(self.frames)])


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip: its frames' files, or one animated file."""

    name: str
    files: tuple[str, ...]
    captions: tuple[str, ...]

    def frames(self, num: int) -> list[np.ndarray]:
        """Returns `num` frames, u8[H W 3]. Raises UserError for a file that cannot be decoded."""
        try:
            return self._frames(num)
        except (pictures.BadImage, OSError, SyntaxError, EOFError) as e:  # as Pillow has it
            got, do = (
                f"a bad image ({type(e).__name__}: {e!s:.80})",
                "remove the clip, or repair it",
            )
            raise check.error(f"clip {self.name!r}", got, "frames", do) from e

    def _frames(self, num: int) -> list[np.ndarray]:
        first, *more = self.files
        if more:
            return [self._file(self.files[k]) for k in places(len(self.files), num)]
        with Image.open(first) as image:
            total = getattr(image, "n_frames", 1)
            out = []
            for k in places(total, num):
                image.seek(k)
                out.append(np.asarray(image.convert("RGB")))
        return out

    def _file(self, path: str) -> np.ndarray:
        with open(path, "rb") as f:
            return pictures.Picture(f.read()).pixels()[0]


def places(total: int, num: int) -> list[int]:
    """Returns which of `total` frames are taken: the middles of `num` equal parts."""
    return [int((k + 0.5) * total / num) for k in range(num)]


def clips(path: str, where: str) -> list[Clip]:
    """Returns the clips of a folder, by name. Raises UserError for one without captions, or if there is none."""
    root = pathlib.Path(path)
    out = []
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        files: tuple[str, ...]
        if entry.is_dir():
            files = tuple(str(f) for f in sorted(entry.iterdir()) if f.suffix.lower() in IMAGES)
        else:
            files = (str(entry),) if entry.suffix.lower() in ANIMATED else ()
        if not files or entry.name.startswith("."):
            continue
        beside = entry.with_suffix(".txt") if entry.is_file() else root / f"{entry.name}.txt"
        if not beside.is_file():
            do = "write its captions there, one a line"
            raise check.error(where, f"clip {entry.name!r} without {beside.name}", "captions", do)
        lines = ios.lines_of(str(beside), where)
        out.append(Clip(entry.name, files, tuple(line.strip() for line in lines)))
    if not out:
        expected = "a folder of clips: folders of frames, or animated GIF, WebP or PNG files"
        raise check.error(where, f"no clip in {path!r}", expected, "correct the path")
    return out


def pooled(apply: Apply, image: jax.Array, *, frames: int, pool: str) -> jax.Array:
    """Embeddings of clips, f32[B E], from their frames, u8[B·T R R 3]."""
    if pool == "attention":
        return apply("image", image, frames=frames)["embed"].astype(np.float32)
    z = apply("image", image)["embed"].astype(np.float32)
    z = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    z = z.reshape(-1, frames, z.shape[-1]).mean(axis=1)
    return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
