"""Zero-shot classification and retrieval on every dataset of a folder.

    vlp eval --workdir RUN --evals configs/evals/zeroshot_suite.py:root=DIR --json out.jsonl

Each sub-folder of `root` is a dataset, and its name is the evaluation's:
  - CLIP_benchmark's WebDataset layout: classnames.txt and zeroshot_classification_templates.txt beside test/0.tar …;
    with dataset_type.txt = "retrieval", each line of a sample's txt is a caption;
  - any other dataset of docs/data.md with classnames.txt beside it (a name a line, in the order of the sorted labels,
    or value<TAB>name);
  - ImageNet's layout, test/<class>/*.jpg; without classnames.txt, the folders' names are those of the classes.

Arguments: root, split, batch, templates (a set or a file, where a dataset has none), only (a+b: these datasets alone).
"""

import pathlib

import ml_collections

from vlp.core import check
from vlp.core.config import parse_arg

TEMPLATES = "zeroshot_classification_templates.txt"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, root="", split="test", batch=64, templates="short", only="")
    root = pathlib.Path(arg.root)
    if not arg.root or not root.is_dir():
        do = "write zeroshot_suite.py:root=DIR"
        raise check.error("config argument root", repr(arg.root), "a folder of datasets", do)
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = arg.only.split("+") if arg.only else [p.name for p in found]
    for name in names:
        if not (root / name).is_dir():
            raise check.unknown("config argument only", name, [p.name for p in found])
    if not names:
        raise check.error("config argument root", f"no folder in {root}", "datasets", "correct it")
    return ml_collections.ConfigDict(
        {name.replace(".", "_"): evaluator(root / name, arg) for name in names}
    )


def evaluator(folder: pathlib.Path, arg: ml_collections.ConfigDict) -> dict:
    """Returns the section that evaluates one dataset."""
    common = dict(split=arg.split, batch=arg.batch)
    kind = folder / "dataset_type.txt"
    if kind.is_file() and kind.read_text().strip().lower() == "retrieval":
        data = dict(path=str(folder), lines=True)
        return dict(name="retrieval", num_captions=0, gallery=0, data=data, **common)
    own = folder / TEMPLATES
    out = dict(name="zeroshot", label="label", items=0, data=dict(path=str(folder)), **common)
    out["template_set"] = str(own) if own.is_file() else arg.templates
    if (folder / "classnames.txt").is_file():
        return out | {"class_set": str(folder / "classnames.txt")}
    classes = [p.name for p in sorted((folder / arg.split).glob("*")) if p.is_dir()]
    if len(classes) < 2:
        got, do = f"{folder} without classnames.txt or folders of classes", "add classnames.txt"
        raise check.error("config argument root", got, "the names of its classes", do)
    return out | {"classes": classes, "phrases": [c.replace("_", " ") for c in classes]}
