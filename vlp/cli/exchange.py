"""`vlp ckpt import` and `vlp ckpt export`: weights of other libraries, in and out."""

import argparse


def add_actions(actions: argparse._SubParsersAction) -> None:
    about = "read a model of OpenCLIP, Hugging Face or big_vision; writes a workdir"
    one = actions.add_parser("import", help=about, description=about)
    one.add_argument("source", metavar="PATH", help="a folder (OpenCLIP, Hugging Face), or a .npz")
    one.add_argument("--out", required=True, metavar="DIR", help="a new workdir")
    one.add_argument("--tokenizer", default="", metavar="FILE", help="default: the folder's own")
    one.add_argument(
        "--only", default="", metavar="image", help="the image tower alone (LiT's .npz)"
    )
    one.epilog = "Then: vlp eval --workdir DIR, vlp caption --workdir DIR, --config.init=DIR"
    one.set_defaults(run=import_)
    about = "write a checkpoint as a model of OpenCLIP, Hugging Face or big_vision"
    one = actions.add_parser("export", help=about, description=about)
    one.add_argument("workdir", metavar="WORKDIR", help="a run of `vlp train`, or an imported one")
    one.add_argument(
        "--to", required=True, metavar="SYSTEM", help="open_clip, hugging_face or big_vision"
    )
    one.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder (big_vision: a .npz)"
    )
    one.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    one.set_defaults(run=export)
    for action in (actions.choices["import"], actions.choices["export"]):
        action.add_argument("--no-compare", action="store_true",
                            help="do not run the other library, where it is installed")  # fmt: skip


def import_(args: argparse.Namespace) -> int:
    import pathlib

    from vlp.cli.main import start_jax
    from vlp.core import paths
    from vlp.exchange import checkpoint, folders

    source, out = pathlib.Path(args.source), paths.parse("--out", args.out)
    checkpoint.check_out(out)
    start_jax()
    exchanged = folders.read(source, args.tokenizer, args.only)
    checkpoint.write(exchanged, out)
    num = sum(x.size for x in exchanged.leaves.values())
    print(
        f"{out}: {num:,} parameters in {len(exchanged.leaves)} leaves, from {exchanged.system} {exchanged.source}"
    )
    _compare(args, exchanged, source, exchanged.system)
    return 0


def export(args: argparse.Namespace) -> int:
    import pathlib

    from vlp.cli.main import start_jax
    from vlp.exchange import checkpoint, folders

    out = pathlib.Path(args.out)
    checkpoint.check_out(out)
    start_jax()
    exchanged = checkpoint.read(args.workdir, args.step)
    remarks = folders.write(exchanged, out, args.to)
    for remark in [f"{out}: a model of {args.to}", *remarks]:
        print(remark)
    if args.to != "big_vision":
        again = (
            folders.read(out) if not remarks else folders.read(out, str(out / "tokenizer.model"))
        )
        _compare(args, again, out, args.to)
    return 0


def _compare(args: argparse.Namespace, exchanged, folder, system: str) -> None:
    from vlp.exchange import compare

    if args.no_compare:
        return
    found = compare.difference(exchanged, folder, system)
    if isinstance(found, str):
        print(found)
        return
    shown = ", ".join(f"{name} {x:.1e}" for name, x in found.items())
    print(f"largest difference from {system}: {shown}")
