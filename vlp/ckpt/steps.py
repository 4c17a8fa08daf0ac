"""The folder that holds a run's checkpoints: which steps it has, tags, copies, removal. No arrays are read here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlp.ckpt import digest
from vlp.ckpt.keep import Keep
from vlp.core import check, paths

log = logging.getLogger(__name__)
ITEMS = ("params", "rest", "meta")
_STEP = re.compile(r"step_(\d{9,})")
_UNFINISHED = re.compile(r"step_\d{9,}\.orbax-checkpoint-tmp.*")
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


def folder(checkpoints: paths.Path, step: int) -> paths.Path:
    return checkpoints / f"step_{step:09d}"


def listed(checkpoints: paths.Path) -> list[int]:
    """Returns the steps that have a folder, in order; whole or not.

    On a store a folder appears with its first object: there a step is one that has the commit marker.
    """
    found = {
        int(m.group(1)): p for p in paths.listing(checkpoints) if (m := _STEP.fullmatch(p.name))
    }
    if paths.is_remote(checkpoints):
        return sorted(n for n, p in found.items() if paths.is_file(p / digest.MARKER))
    return sorted(found)


def unfinished(checkpoints: paths.Path) -> list[str]:
    """Returns the names of folders that saves which never ended have left."""
    names = [p.name for p in paths.listing(checkpoints)]
    left = [n for n in names if _UNFINISHED.fullmatch(n)]
    if paths.is_remote(checkpoints):
        whole = set(listed(checkpoints))
        left += [n for n in names if (m := _STEP.fullmatch(n)) and int(m.group(1)) not in whole]
    return sorted(left)


def meta(checkpoints: paths.Path, step: int) -> dict[str, Any]:
    """Returns the JSON-able facts of a checkpoint."""
    return json.loads(paths.read(folder(checkpoints, step) / "meta" / "metadata"))


def scores(checkpoints: paths.Path, step: int) -> dict[str, float]:
    """Returns the evaluations of a checkpoint's step, {EVALUATION/METRIC: value}; {} if there were none."""
    try:
        return dict(meta(checkpoints, step).get("scores", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


# ---- tags


def tags(checkpoints: paths.Path) -> dict[str, int]:
    """Returns {tag: step}. Each is a file of its own, so that two may be set at the same time."""
    out = {}
    for path in paths.listing(checkpoints / "tags"):
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            out[path.name.removesuffix(".json")] = int(json.loads(paths.read(path))["step"])
    return out


def tag(checkpoints: paths.Path, name: str, step: int | None) -> None:
    """Gives a step a tag, which moves there if it is another step's; None: removes the tag.

    Raises:
        UserError: the name cannot be a tag, there is no such step, or no such tag to remove.
    """
    if not _TAG.fullmatch(name):
        expected = "letters, digits, '_', '-' and '.', up to 64 of them"
        raise check.error("vlp ckpt tag", repr(name), expected, "choose another name")
    path = checkpoints / "tags" / f"{name}.json"
    if step is None:
        if name not in (known := tags(checkpoints)):
            raise check.unknown("vlp ckpt tag", name, known)
        paths.remove(path)
        return
    check_step(checkpoints, step)
    paths.make_dir(path.parent)
    paths.write(path, (json.dumps({"step": step}) + "\n").encode())


def first_whole(
    candidates: Iterable[int], problem: Callable[[int], str]
) -> tuple[int | None, dict[int, str]]:
    """Returns the first whole step, and what is wrong with those before it (and with it, if it has no manifest).

    A step without a manifest counts only if no other is whole.
    """
    problems: dict[int, str] = {}
    for step in candidates:
        if not (found := problem(step)):
            return step, problems
        problems[step] = found
    unlisted = (step for step, found in problems.items() if found == digest.UNLISTED)
    return next(unlisted, None), problems


def say(problems: Mapping[int, str], step: int, folder: Callable[[int], paths.Path]) -> None:
    """Logs what `first_whole` found wrong before it chose `step`."""
    for other, problem in problems.items():
        what = "its files cannot be checked"
        if other != step:
            what = f"using step {int(folder(step).name.removeprefix('step_'))} instead"
        log.warning("%s: %s; %s", folder(other), problem, what)


def check_step(checkpoints: paths.Path, step: int) -> None:
    """Raises UserError unless there is a checkpoint of this step."""
    known = listed(checkpoints)
    if step not in known:
        got, expected = f"step {step}", f"one of steps {known}"
        do = f"give {known[-1]}, for instance" if known else "train first, or correct the path"
        raise check.error(os.fspath(checkpoints), got, expected, do)


# ---- keeping and removing


def not_kept(checkpoints: paths.Path, last: int, keep: Keep) -> list[int]:
    """Returns the steps that no rule keeps, oldest first. Never one with a tag, or with files of somebody else.

    last: number of the newest steps to keep.
    """
    steps = listed(checkpoints)
    kept = {*steps[-last:], *tags(checkpoints).values()}
    if keep.every_steps:
        kept |= {step for step in steps if step % keep.every_steps == 0}
    if keep.best:
        found = {step: scores(checkpoints, step).get(keep.metric) for step in steps}
        sign = 1 if keep.mode == "max" else -1
        ranked = [(sign * v, step) for step, v in found.items() if v is not None and v == v]
        kept |= {step for _, step in sorted(ranked)[-keep.best :]}
    left = [step for step in steps if step not in kept]
    return [step for step in left if not digest.foreign(folder(checkpoints, step))]


def remove(path: paths.Path) -> None:
    """Removes the folder of a checkpoint: the commit marker first, so that it is never taken for a whole one."""
    paths.remove(path / digest.MARKER)
    names = sorted(paths.files(path), key=lambda name: name == digest.FILE)
    for name in names:  # the manifest last: it tells that the rest is ours to remove
        paths.remove(path / name)
    paths.remove_tree(path)


def why_not(checkpoints: paths.Path, step: int, newest: int | None) -> str:
    """Returns why `vlp ckpt rm` does not remove a step, or ""."""
    named = [name for name, there in tags(checkpoints).items() if there == step]
    if named:
        return f"a step with the tag {named[0]!r}"
    if others := digest.foreign(folder(checkpoints, step)):
        if others == [digest.FILE]:
            return f"a folder without {digest.FILE}, which vlp may not have written"
        return f"a folder with a file that vlp did not write ({others[0]})"
    return "the newest whole checkpoint, from which the run continues" if step == newest else ""


# ---- copying


def copy(source: paths.Path, target: paths.Path) -> None:
    """Copies a checkpoint's folder, the commit marker last, and checks the copy.

    Raises:
        UserError: the target exists, or the source is not whole.
        Failed: the copy is not equal to the source; it stays without a commit marker.
    """
    if paths.exists(target):
        do = "choose another place"
        raise check.error(os.fspath(target), "a checkpoint", "a step that is not there yet", do)
    manifest, found = digest.opened(source, ITEMS)
    if found := found or digest.check_files(source, manifest, manifest):
        do = "copy another step"
        raise check.error(os.fspath(source), found, "a whole checkpoint", do)
    names = paths.files(source)
    for name in names:
        if name != digest.MARKER:
            paths.copy(source / name, target / name)
    for name in digest.empty_folders(source):
        paths.make_dir(target / name)
    kept: Mapping[str, Any] = {n: e for n, e in manifest.items() if n != digest.MARKER}
    problem = digest.check_files(target, kept, kept)
    if problem:
        raise check.Failed(
            f"{target}: got {problem}, expected a copy of {source}; check the source with "
            "`vlp ckpt verify`, remove the copy and repeat"
        )
    if digest.MARKER in names:
        paths.copy(source / digest.MARKER, target / digest.MARKER)
