"""What `vlp ckpt` does with the checkpoints of a run: list, check, remove, copy. No JAX backend is started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence

from vlp.ckpt import digest, steps
from vlp.core import check, paths


def opened(workdir: str) -> paths.Path:
    """Returns the folder of a run's checkpoints. Raises UserError if there is none."""
    folder = paths.parse("vlp ckpt", workdir) / "checkpoints"
    if not paths.is_dir(folder):
        do = "give the --workdir of a run"
        raise check.error("vlp ckpt", f"no checkpoints in {workdir!r}", "a workdir", do)
    return folder


def table(checkpoints: paths.Path) -> str:
    """Returns a line per step (bytes, time, tags, scores, state), then what unfinished saves left."""
    rows = [("step", "MB", "saved", "tags", "state", "scores")]
    names: dict[int, list[str]] = {}
    for name, step in steps.tags(checkpoints).items():
        names.setdefault(step, []).append(name)
    for step in steps.listed(checkpoints):
        folder = steps.folder(checkpoints, step)
        num_bytes = sum(paths.files(folder).values())
        state = _state(folder)
        scores = "  ".join(f"{k} {v:.4g}" for k, v in steps.scores(checkpoints, step).items())
        tags = ", ".join(names.get(step, []))
        rows.append((str(step), f"{num_bytes / 1e6:.1f}", _saved(folder), tags, state, scores))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(n) for x, n in zip(row, wide)).rstrip() for row in rows]
    lines += [f"{name}: an unfinished save" for name in steps.unfinished(checkpoints)]
    return "\n".join(lines)


def verify(checkpoints: paths.Path, wanted: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yields each step, or each wanted one, with what is wrong with its files ("": nothing)."""
    for step in wanted:
        steps.check_step(checkpoints, step)
    for step in wanted or steps.listed(checkpoints):
        yield step, digest.problem(steps.folder(checkpoints, step), steps.ITEMS)


def remove(
    checkpoints: paths.Path, wanted: Sequence[int], unfinished: bool, dry_run: bool
) -> Iterator[str]:
    """Removes steps; yields a line for each.

    Args:
        checkpoints: the folder.
        wanted: the steps.
        unfinished: remove also what unfinished saves left. A run that is saving must be stopped before.
        dry_run: only say it.

    Raises:
        UserError: a step is not there, has a tag, holds files that vlp did not write, or is the newest whole one.
            Then none is removed.
    """
    word = "would remove" if dry_run else "removed"
    newest = newest_whole(checkpoints) if wanted else None
    for step in wanted:
        steps.check_step(checkpoints, step)
        if why := steps.why_not(checkpoints, step, newest):
            do = "remove the tag or the file first" if step != newest else "keep it"
            raise check.error(f"vlp ckpt rm {step}", why, "a checkpoint to remove", do)
    for step in wanted:
        if not dry_run:
            steps.remove(steps.folder(checkpoints, step))
        yield f"{word} step {step}"
    for name in steps.unfinished(checkpoints) if unfinished else ():
        if not dry_run:
            paths.remove_tree(checkpoints / name)
        yield f"{word} {name}"


def copy(checkpoints: paths.Path, target: str, step: int | None) -> str:
    """Copies a checkpoint (None: the newest whole one) into the workdir `target`; returns its folder there."""
    where = paths.parse("vlp ckpt cp", target)
    if step is None:
        step = newest_whole(checkpoints)
    if step is None:
        do = "train first, or give --step"
        raise check.error(os.fspath(checkpoints), "no whole checkpoint", "one to copy", do)
    steps.check_step(checkpoints, step)
    to = steps.folder(where / "checkpoints", step)
    steps.copy(steps.folder(checkpoints, step), to)
    return os.fspath(to)


def newest_whole(checkpoints: paths.Path) -> int | None:
    """Returns the newest step whose files are whole; None if there is none."""
    problem = lambda step: digest.problem(steps.folder(checkpoints, step), steps.ITEMS)
    return next((s for s in reversed(steps.listed(checkpoints)) if not problem(s)), None)


def _state(folder: paths.Path) -> str:
    """What is wrong at first sight: nothing is hashed."""
    _, found = digest.opened(folder, steps.ITEMS)
    others = digest.foreign(folder)
    if found or not others:
        return found or "complete"
    return f"complete; not of vlp: {others[0]}"


def _saved(folder: paths.Path) -> str:
    """The time of the commit, in UTC."""
    try:
        nanos = json.loads(paths.read(folder / digest.STEP))["commit_timestamp_nsecs"]
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(nanos / 1e9))
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
