"""Exact retrieval among many images and texts: minutes, and memory beyond the embeddings.

    python benchmarks/retrieval.py --num 200000 --width 512
    python benchmarks/retrieval.py --num 3000 --width 64 --check      # against a full float64 matrix

The embeddings are drawn, each text near its image.
"""

import resource
import time

import bench


def draw(num: int, width: int):
    """Returns unit rows of images and texts, float32; about half of the texts are nearest to their image."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.standard_normal((num, width), np.float32)
    texts = rng.standard_normal((num, width), np.float32)
    for k in range(0, num, 4096):
        part = slice(k, k + 4096)
        images[part] /= np.linalg.norm(images[part], axis=1, keepdims=True)
        texts[part] /= np.linalg.norm(texts[part], axis=1, keepdims=True)
        texts[part] += 0.2 * images[part]
        texts[part] /= np.linalg.norm(texts[part], axis=1, keepdims=True)
    return images, texts


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--num", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--check", action="store_true", help="compare with all scores in float64")
    args = bench.options(parser)

    import jax
    import numpy as np

    from vlp.core import mesh as meshes
    from vlp.evals import ranks

    images, texts = draw(args.num, args.width)
    mesh = meshes.make(meshes.MeshShape())
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    before, began, cpu = peak(), time.monotonic(), time.process_time()
    found = ranks.ranks(images, texts, np.arange(args.num), mesh, args.tile)
    row = {
        "num": args.num,
        "width": args.width,
        "tile": args.tile,
        "devices": len(jax.devices()),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 2),
        "embeddings_mb": round((images.nbytes + texts.nbytes) / bench.MB),
        "beyond_mb": round(peak() - before),
        "i2t/R@1": float((found[0] <= 1).mean()),
        "t2i/R@10": float((found[1] <= 10).mean()),
    }
    if args.check:
        scores = images.astype(np.float64) @ texts.T.astype(np.float64)
        right = np.diagonal(scores).copy()
        same = [(scores >= right[:, None]).sum(1), (scores >= right[None]).sum(0)]
        row["exact"] = all(bool((a == b).all()) for a, b in zip(found, same))
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    bench.save(args.json, [row])


if __name__ == "__main__":
    bench.run(main)
