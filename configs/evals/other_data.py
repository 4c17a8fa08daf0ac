"""Retrieval of one checkpoint on other datasets and other languages of captions.

    vlp eval --workdir RUN --evals configs/evals/other_data.py:paths=data/a+data/b,langs=en+de --json out.jsonl

One evaluation for each dataset and language, named after both; without langs, captions in any language count. The
emoji of `vlp data emoji` have names in 14 languages; the same emoji in other artwork are another dataset.

Arguments: paths, langs, split, batch, num_captions.
"""

import pathlib

import ml_collections

from vlp.core.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, paths="", langs="", split="test", batch=64, num_captions=1)
    c = ml_collections.ConfigDict()
    for path in arg.paths.split("+"):
        for lang in arg.langs.split("+"):
            label = "_".join(filter(None, (pathlib.Path(path).name.replace(".", "_"), lang)))
            data = dict(path=path, langs=(lang,) if lang else ())
            c[label or "retrieval"] = dict(
                name="retrieval",
                split=arg.split,
                batch=arg.batch,
                num_captions=arg.num_captions,
                gallery=0,
                data=data,
            )
    return c
