"""`vlp caption`: captions image files with a trained model."""

import argparse
import os


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "caption images with a trained model (greedy)"
    parser = subparsers.add_parser("caption", help=about, description=about)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="a run of `vlp train` with a decoder"
    )
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument(
        "--no-golden", action="store_true", help="do not compare the golden pair with training's"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlp.cli.main import start_jax
    from vlp.core import check, paths
    from vlp.data import pictures
    from vlp.infer.caption import caption
    from vlp.infer.load import load

    images = []
    for path in args.images:
        if os.path.isdir(path):
            do = f"name its files, {os.path.join(path, '*.jpg')} say"
            raise check.error("vlp caption", f"the folder {path!r}", "image files", do)
        if not paths.is_file(path):
            raise check.error("vlp caption", f"no file {path!r}", "image files", "correct the path")
        try:
            images.append(pictures.decode(paths.read(path)))
        except pictures.BadImage as e:
            got = f"{path!r}, which is not a usable image ({e})"
            raise check.error("vlp caption", got, "image files", "leave it out") from e
    start_jax()
    loaded = load(args.workdir, args.step, golden=not args.no_golden)
    for path, text in zip(args.images, caption(loaded, images)):
        print(f"{path}\t{text}")
    return 0
