"""One small set of image–text pairs written in every format that `vlp data` reads."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def jpeg(seed: int, size=(24, 18)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def rows(num: int = 12) -> list[dict]:
    return [{"key": f"id{i:03d}", "jpg": jpeg(i), "caption": f"picture no {i}"} for i in range(num)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar(path, pairs, *, text="txt") -> None:
    with tarfile.open(path, "w") as archive:
        for row in pairs:
            add(archive, f"{row['key']}.jpg", row["jpg"])
            add(archive, f"{row['key']}.{text}", row["caption"].encode())


def img2dataset(directory, shard: int, pairs, failed=()) -> None:
    """A shard as img2dataset lays it out: tar, status Parquet with the failures, _stats.json."""
    directory.mkdir(exist_ok=True)
    sidecar = []
    with tarfile.open(directory / f"{shard:05d}.tar", "w") as archive:
        for row in pairs:
            meta = {"key": row["key"], "caption": row["caption"], "status": "success"}
            meta["mine"] = f"own-{row['key']}"
            add(archive, f"{row['key']}.jpg", row["jpg"])
            add(archive, f"{row['key']}.json", json.dumps(meta).encode())
            add(archive, f"{row['key']}.txt", row["caption"].encode())
            sidecar.append(meta | {"error_message": None})
    for key, status, cause in failed:
        sidecar.append({"key": key, "caption": "lost", "status": status} | cause)
        sidecar[-1]["mine"] = f"own-{key}"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(sidecar), directory / f"{shard:05d}.parquet"
    )
    counts = {"success": len(pairs)}
    for _, _, cause in failed:
        counts[cause["error_message"]] = counts.get(cause["error_message"], 0) + 1
    stats = {"count": len(sidecar), "successes": len(pairs), "status_dict": counts}
    (directory / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def parquet(path, pairs, *, row_group_size=5) -> None:
    table = pyarrow.Table.from_pylist(
        [{"key": r["key"], "image": {"bytes": r["jpg"], "path": None}, "caption": r["caption"]}
         for r in pairs]
    )  # fmt: skip
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def tfds(directory, pairs, captions=None) -> str:
    """Prepares an ArrayRecord TFDS dataset; returns the directory of its version.

    captions: its feature of captions, by default one text a row.
    """
    import tensorflow_datasets as tfds_lib

    with tfds_lib.core.registered.skip_registration():  # a second test may define it again

        class Pairs(tfds_lib.core.GeneratorBasedBuilder):
            VERSION = tfds_lib.core.Version("1.0.0")
            pkg_dir_path = directory

            def _info(self):
                features = tfds_lib.features.FeaturesDict(
                    {
                        "key": tfds_lib.features.Text(),
                        "image": tfds_lib.features.Image(encoding_format="jpeg"),
                        "caption": captions or tfds_lib.features.Text(),
                    }
                )
                return self.dataset_info_from_configs(features=features)

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self, *_):
                for r in pairs:
                    yield (
                        r["key"],
                        {"key": r["key"], "image": io.BytesIO(r["jpg"]), "caption": r["caption"]},
                    )

    builder = Pairs(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def clip_merges(num: int) -> bytes:
    """A merges file, as CLIP's, of `num` different lines, the last of which would join two letters of "qz"."""
    letters = [chr(i) for i in range(ord("a"), ord("p"))]
    lines, level = [], letters
    while len(lines) < num:
        level = [(x, y) for x in level[:300] for y in letters]
        lines += [f"{x} {y}" for x, y in level]
        level = [x + y for x, y in level]
    return ("#version\n" + "\n".join([*lines[: num - 1], "q z"])).encode()
