"""`vlp eval`: evaluates a trained run again, with its own or other evaluators, on its own or other data."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp.infer.load import Loaded

# What an override may set: the checkpoint was trained with the other values.
SECTIONS = ("evals", "data", "eval_params", "plugins")
TRAINED = ("image_px", "text_len", "tokenizer")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "evaluate a checkpoint; writes nothing unless asked to"
    parser = subparsers.add_parser("eval", help=about, description=about)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run of `vlp train`")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument(
        "--evals",
        default="",
        metavar="A,B|FILE.py:ARG",
        help="labels of config.evals (default: all), or a config file of evaluators instead",
    )
    parser.add_argument(
        "--data", default="", metavar="PATH", help="evaluate on this dataset instead of the run's"
    )
    parser.add_argument(
        "--split",
        default="",
        help="evaluate on this split only; skip evaluators that cannot use it",
    )
    about = "write the results as JSON; FILE.jsonl: one line a result, as soon as it is known"
    parser.add_argument("--json", default="", metavar="FILE", help=about)
    parser.add_argument(
        "--write", action="store_true", help="write galleries into DIR/evals for `vlp report`"
    )
    parser.add_argument(
        "--no-golden", action="store_true", help="do not compare the golden pair with training's"
    )
    parser.epilog = (
        "Also: --config.evals.LABEL.key=value (which may add a label) and --config.data.key=value"
    )
    parser.set_defaults(run=run, config="", overrides=[])


def run(args: argparse.Namespace) -> int:
    import dataclasses

    import jax

    from vlp.cli.main import start_jax
    from vlp.core import check, mesh, paths, progress
    from vlp.evals import io as ios
    from vlp.infer.load import load
    from vlp.runtime import workdir

    start_jax()
    directory = paths.parse("--workdir", args.workdir)
    check.output_file("--json", args.json)
    if args.write and not paths.is_remote(directory) and paths.is_dir(directory):
        workdir.check_links(directory)
        check.output_dir("--write", directory / "evals")
    loaded = load(args.workdir, args.step, golden=not args.no_golden)
    loaded, chosen = configured(loaded, args)
    if not chosen:
        print(f"{args.workdir}: config.evals is empty: nothing to evaluate")
    write = lambda name, value: workdir.write_artefact(
        directory, name, {"step": loaded.step} | value
    )
    io = ios.IO(loaded.data, loaded.tokenizer)
    io = dataclasses.replace(io, write=write) if args.write else io
    device_mesh = mesh.make(mesh.MeshShape())
    chosen = ready(chosen, args, loaded, device_mesh, io)
    known = {"step": loaded.step, "checkpoint": ios.digest_params(loaded.apply.params)}
    rows, in_lines = [], args.json.endswith(".jsonl")
    with jax.set_mesh(device_mesh):
        for label in chosen:
            with progress.phase(f"vlp eval: {label}"):
                results = ios.run(chosen, label, loaded.apply, device_mesh, io)
            for r in results:
                row = {"eval": label, "metric": r.metric, "value": r.value} | known
                rows.append(row | dict(r.provenance))
                split = r.provenance.get("split", "")
                print(f"{label:12s} {split:10s} {r.metric:24s} {r.value:.4f}")
            if in_lines:
                text = "".join(workdir.dump(row) + "\n" for row in rows)
                pathlib.Path(args.json).write_text(text)
    if args.json and not in_lines:
        pathlib.Path(args.json).write_text(workdir.dump(rows, indent=1) + "\n")
    return 0


def configured(loaded: Loaded, args: argparse.Namespace) -> tuple[Loaded, dict[str, Any]]:
    """Returns the run with the data and parameters that the command asks for, and the chosen evaluators by label."""
    import dataclasses

    from vlp.core import check, paths
    from vlp.core.config import build, override, plain
    from vlp.core.config import load as load_config
    from vlp.data.config import Data
    from vlp.evals.io import located
    from vlp.infer.load import load, plugins_of, stage_config
    from vlp.runtime import workdir
    from vlp.train import stages

    config = workdir.latest(paths.parse("--workdir", args.workdir), loaded.meta["config"])
    section = stage_config(config, loaded.meta["stage"])
    for item in args.overrides:
        key = item.partition("=")[0]
        first, _, second = key.partition(".")
        if first not in SECTIONS or (first == "data" and second in ("", *TRAINED)):
            expected = f"a key of {', '.join(SECTIONS)}, but not data.{', data.'.join(TRAINED)}"
            do = "give it to `vlp train`: the checkpoint was trained with another value"
            raise check.error("vlp eval", f"--config.{key}", expected, do)
    before = section.get("eval_params")
    section = {"evals": {}, **section, "data": plain(loaded.data)}
    if args.data:
        section["data"] |= {"source": "records", "path": args.data, "mixture": [], "reweight": []}
        section["data"]["skip"] = ""  # it lists records of the run's own data
    own_file = args.evals.partition(":")[0].endswith(".py")
    if own_file:
        found = load_config(args.evals)
        section["plugins"] = [*section.get("plugins", []), *found.pop("plugins", [])]
        section["evals"] = found.get("evals", found)
    override(section, args.overrides)
    if section.get("eval_params") != before:
        own = section["eval_params"]
        loaded = load(args.workdir, loaded.step, own, golden=not args.no_golden)
    loaded = dataclasses.replace(loaded, data=build(Data, section["data"], "config.data"))
    evals = stages.evaluators(section["evals"], plugins_of(section))
    if own_file:
        return loaded, evals
    evals = {k: located(e, loaded.meta.get("cwd", "")) for k, e in evals.items()}
    for label in (labels := [a for a in args.evals.split(",") if a] or list(evals)):
        if label not in evals:
            raise check.unknown("--evals", label, evals)
    return loaded, {label: evals[label] for label in labels}


def ready(
    chosen: dict[str, Any], args: argparse.Namespace, loaded: Loaded, device_mesh: Any, io: Any
) -> dict[str, Any]:
    """Returns the evaluators, by label, that can run on `--split` (default: on their own splits).

    With `--split`, an evaluator that cannot run is skipped and the reason is printed, unless an option names it.

    Raises:
        UserError: without `--split`, if any evaluator cannot run; with it, if a named one or all cannot run.
    """
    from vlp.core import check
    from vlp.evals.io import check_asks, check_ready

    named = {a for a in args.evals.split(",") if a}
    named |= {item.split(".")[1] for item in args.overrides if item.startswith("evals.")}
    found, refused = {}, {}
    for label, evaluator in chosen.items():
        try:
            evaluator = on_split(evaluator, args.split)
            check_ready(evaluator, device_mesh, io, f"config.evals.{label}")
            check_asks(evaluator, loaded.apply, loaded.data, f"config.evals.{label}")
            found[label] = evaluator
        except check.Failed:
            raise
        except check.UserError as e:
            if not args.split or label in named:
                raise
            refused[label] = e
    if refused and not found:
        raise next(iter(refused.values()))
    for label, e in refused.items():
        print(f"{label:12s} skipped on split {args.split!r}: {check.line(e)}")
    return found


def on_split(evaluator: Any, split: str) -> Any:
    """The evaluator, reading this split and no other ("": its own)."""
    import dataclasses

    if not split or not getattr(evaluator, "reads_dataset", True):
        return evaluator
    alone = {"extra_splits": ()} if hasattr(evaluator, "extra_splits") else {}
    return dataclasses.replace(evaluator, split=split, **alone)
