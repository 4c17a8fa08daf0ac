"""`vlp average`: averages the parameters of checkpoints, as a workdir to evaluate or to start a run from."""

import argparse
import os


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "average checkpoints of one model (WiSE-FT, soups)"
    parser = subparsers.add_parser("average", help=about, description=about)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="DIR[@STEP]",
        help="runs of `vlp train` (default step: the newest)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--weights", default="", metavar="A,B,…", help="default: equal weights")
    parser.epilog = "Then: vlp eval --workdir DIR, vlp caption --workdir DIR, --config.init=DIR"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlp.cli.main import start_jax
    from vlp.core import paths
    from vlp.infer import average
    from vlp.infer.load import load

    out = paths.parse("--out", args.out)
    average.check_out(out)
    start_jax()
    weights = parse_weights(args.weights, len(args.models))
    models = [load(*parse_model(text)) for text in args.models]
    average.write(out, models, weights)
    plan = (f"{w:.3g} × {text}" for w, text in zip(weights, args.models))
    print(f"{args.out}: {' + '.join(plan)}")
    return 0


def parse_model(text: str) -> tuple[str, int | None]:
    """Splits "DIR@STEP" into both; an existing directory whose name has an @ is taken whole."""
    directory, at, step = text.rpartition("@")
    if not at or os.path.isdir(text) or not step.isdecimal():
        return text, None
    return directory, int(step)


def parse_weights(text: str, num: int) -> list[float]:
    """Returns one finite weight per model; they add up to 1. Raises UserError for other texts."""
    import math

    from vlp.core import check

    if not text:
        return [1 / num] * num
    try:
        weights = [float(w) for w in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != num or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        do = "give, for instance, --weights 0.3,0.7"
        raise check.error("--weights", repr(text), f"{num} numbers with sum 1", do)
    return weights
