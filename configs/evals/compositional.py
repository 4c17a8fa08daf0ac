"""SugarCrepe, ARO, Winoground, VL-CheckList.

    vlp eval --workdir RUN --evals configs/evals/compositional.py:root=DIR,images=IMAGES

Each .json or .jsonl file of `root` is a benchmark or a part of one (SugarCrepe's seven); images is the folder that
their image names start from ("": root).

Arguments: root, images, score (embedding, likelihood or likelihood_mean), min_group (25: ARO's macro mean), batch.
"""

import pathlib

import ml_collections

from vlp.core import check
from vlp.core.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, root="", images="", score="embedding", min_group=1, batch=64)
    files = sorted(pathlib.Path(arg.root or ".").glob("*.json*"))
    if not files:
        do = "write compositional.py:root=DIR"
        raise check.error("config argument root", f"no .json in {arg.root!r}", "some", do)
    common = dict(name="pairs", images=arg.images, score=arg.score, min_group=arg.min_group)
    return ml_collections.ConfigDict(
        {
            file.stem.replace(".", "_"): dict(
                common, path=str(file), split=file.stem, batch=arg.batch
            )
            for file in files
        }
    )
