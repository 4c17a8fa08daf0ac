"""`vlp ckpt`: lists, checks, removes, tags and copies the checkpoints of a run; imports and exports (exchange.py)."""

import argparse

from vlp.cli import exchange


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "list, check, remove, tag, copy, import and export checkpoints"
    parser = subparsers.add_parser("ckpt", help=about, description=about)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=text, description=text)
        one.add_argument("workdir", metavar="WORKDIR", help="a run of `vlp train`")
        one.set_defaults(run=run)
        return one

    steps = {"type": int, "nargs": "*", "metavar": "STEP"}
    action("ls", "list steps, sizes, tags, scores, and what is wrong at first sight", ls)
    one = action("verify", "check every byte against the manifest (exit code 1 on a fault)", verify)
    one.add_argument("steps", **steps, help="default: all")
    one = action("rm", "remove checkpoints that vlp wrote, without a tag", rm)
    one.add_argument("steps", **steps, help="which")
    one.add_argument(
        "--unfinished",
        action="store_true",
        help="also what unfinished saves left; stop the run first",
    )
    one.add_argument("--dry-run", action="store_true", help="say what would be removed")
    one = action("tag", "give a step a name, which keeps it from being deleted", tag)
    one.add_argument("step", metavar="STEP|--delete", nargs="?", type=int)
    one.add_argument("name", metavar="NAME", nargs="?", default="")
    one.add_argument("--delete", metavar="NAME", default="", help="remove this tag instead")
    one = action("cp", "copy a checkpoint into another workdir, and check the copy", cp)
    one.add_argument("target", metavar="TARGET", help="a workdir, here or in a bucket")
    one.add_argument("--step", type=int, help="default: the newest whole one")
    exchange.add_actions(actions)


def ls(args: argparse.Namespace) -> int:
    from vlp.ckpt import catalog

    print(catalog.table(catalog.opened(args.workdir)))
    return 0


def verify(args: argparse.Namespace) -> int:
    from vlp.ckpt import catalog

    good = True
    for step, problem in catalog.verify(catalog.opened(args.workdir), args.steps):
        print(f"step {step}: {problem or 'whole'}", flush=True)
        good = good and not problem
    return 0 if good else 1


def rm(args: argparse.Namespace) -> int:
    from vlp.ckpt import catalog
    from vlp.core import check

    if not args.steps and not args.unfinished:
        do = "name them: vlp ckpt ls lists them"
        raise check.error("vlp ckpt rm", "no step", "steps, or --unfinished", do)
    options = (args.steps, args.unfinished, args.dry_run)
    for text in catalog.remove(catalog.opened(args.workdir), *options):
        print(text, flush=True)
    return 0


def tag(args: argparse.Namespace) -> int:
    from vlp.ckpt import catalog
    from vlp.core import check

    checkpoints = catalog.opened(args.workdir)
    if args.delete:
        catalog.steps.tag(checkpoints, args.delete, None)
        print(f"{args.delete}: removed")
        return 0
    if args.step is None or not args.name:
        do = "write vlp ckpt tag WORKDIR STEP NAME, or --delete NAME"
        raise check.error("vlp ckpt tag", "no step and name", "both", do)
    catalog.steps.tag(checkpoints, args.name, args.step)
    print(f"{args.name}: step {args.step}")
    return 0


def cp(args: argparse.Namespace) -> int:
    from vlp.ckpt import catalog

    print(catalog.copy(catalog.opened(args.workdir), args.target, args.step))
    return 0
