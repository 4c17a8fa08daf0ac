"""`vlp eval`: runs the evaluations of a trained run again, or others."""

import argparse
import pathlib


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "evaluate a checkpoint"
    parser = subparsers.add_parser("eval", help=about, description=about)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run of `vlp train`")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument(
        "--evals", default="", metavar="A,B", help="labels in config.evals (default: all)"
    )
    parser.add_argument("--split", default="", help="another split than the config's")
    parser.add_argument("--json", default="", metavar="FILE", help="write the results as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    import jax

    from vlp.cli.main import start_jax
    from vlp.core import check, mesh, progress
    from vlp.evals.io import IO, check_ready
    from vlp.infer.load import load
    from vlp.train import stages, workdir

    start_jax()
    loaded = load(args.workdir, args.step)
    _, built = stages.parse(loaded.meta["config"])
    evals = built[loaded.meta["stage"]].evals
    if not evals and not args.evals:
        print(f"{args.workdir}: config.evals has none, so nothing is evaluated")
    for label in (labels := [a for a in args.evals.split(",") if a] or list(evals)):
        if label not in evals:
            raise check.unknown("--evals", label, evals)
    check.output_file("--json", args.json)
    split = {"split": args.split} if args.split else {}
    chosen = {label: dataclasses.replace(evals[label], **split) for label in labels}
    workdir.check_links(pathlib.Path(args.workdir))
    write = lambda name, value: workdir.write_artefact(
        pathlib.Path(args.workdir), name, {"step": loaded.step} | value
    )
    io = IO(loaded.data, loaded.tokenizer, write)
    device_mesh = mesh.make(mesh.MeshShape())
    for label, evaluator in chosen.items():
        check_ready(evaluator, loaded.apply.model, device_mesh, io, f"config.evals.{label}")
    rows = []
    with jax.set_mesh(device_mesh):
        for label, evaluator in chosen.items():
            with progress.phase(f"vlp eval: {label}"):
                results = list(evaluator(loaded.apply, device_mesh, io))
            for r in results:
                rows.append(
                    {
                        "eval": label,
                        "step": loaded.step,
                        "metric": r.metric,
                        "value": r.value,
                        **r.provenance,
                    }
                )
                print(
                    f"{label:12s} {r.provenance.get('split', ''):10s} {r.metric:24s} {r.value:.4f}"
                )
    if args.json:
        pathlib.Path(args.json).write_text(workdir.dump(rows, indent=1) + "\n")
    return 0
