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
        "--evals", default="", metavar="A,B", help="labels of config.evals (default: all)"
    )
    parser.add_argument(
        "--data", default="", metavar="PATH", help="evaluate on this dataset instead of the run's"
    )
    parser.add_argument(
        "--split",
        default="",
        help="evaluate on this split only; skip evaluators that cannot use it",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the results as JSON")
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
    import jax

    from vlp.cli.main import start_jax
    from vlp.core import check, mesh, paths, progress
    from vlp.evals.io import IO, own_names
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
    io = IO(loaded.data, loaded.tokenizer, **({"write": write} if args.write else {}))
    device_mesh = mesh.make(mesh.MeshShape())
    chosen = ready(chosen, args, loaded, device_mesh, io)
    rows = []
    with jax.set_mesh(device_mesh):
        for label, evaluator in chosen.items():
            with progress.phase(f"vlp eval: {label}"):
                own = own_names(chosen, label, io)
                results = list(evaluator(loaded.apply, device_mesh, own))
            for r in results:
                row = {"eval": label, "step": loaded.step, "metric": r.metric, "value": r.value}
                rows.append(row | dict(r.provenance))
                split = r.provenance.get("split", "")
                print(f"{label:12s} {split:10s} {r.metric:24s} {r.value:.4f}")
    if args.json:
        pathlib.Path(args.json).write_text(workdir.dump(rows, indent=1) + "\n")
    return 0


def configured(loaded: Loaded, args: argparse.Namespace) -> tuple[Loaded, dict[str, Any]]:
    """Returns the run with the data and parameters that the command asks for, and the chosen evaluators by label."""
    import dataclasses

    from vlp.core import check, paths
    from vlp.core.config import build, override, plain
    from vlp.data.config import Data
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
    override(section, args.overrides)
    if section.get("eval_params") != before:
        own = section["eval_params"]
        loaded = load(args.workdir, loaded.step, own, golden=not args.no_golden)
    loaded = dataclasses.replace(loaded, data=build(Data, section["data"], "config.data"))
    evals = stages.evaluators(section["evals"], plugins_of(section))
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

    if not split:
        return evaluator
    alone = {"extra_splits": ()} if hasattr(evaluator, "extra_splits") else {}
    return dataclasses.replace(evaluator, split=split, **alone)
