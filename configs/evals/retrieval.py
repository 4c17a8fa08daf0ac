"""Retrieval by Karpathy's protocol.

    vlp eval --workdir RUN --evals configs/evals/retrieval.py:path=DATA,ids=fold1.txt+fold2.txt

DATA is COCO's or Flickr30k's images with Karpathy's JSON (or a dataset that `vlp data convert` made of them). Five
captions an image. ids: files of image keys, one a line, each an evaluation: COCO 1k needs one for each fold; COCO 5k
and Flickr30k 1k are the whole test split, without ids.

Arguments: path, split, ids, batch, num_captions.
"""

import pathlib

import ml_collections

from vlp.core.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="", split="test", ids="", batch=64, num_captions=5)
    common = dict(name="retrieval", split=arg.split, batch=arg.batch, gallery=0)
    common |= dict(num_captions=arg.num_captions)
    c = ml_collections.ConfigDict()
    for file in arg.ids.split("+"):
        label = pathlib.Path(file).stem.replace(".", "_") if file else "retrieval"
        c[label] = dict(common, data=dict(path=arg.path, ids=file))
    return c
