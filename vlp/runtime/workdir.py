"""The files of a run: config, versions, metrics (the record), artefacts of evaluations, checkpoints."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from vlp import __version__
from vlp.ckpt.manager import check_path
from vlp.core import appended, check, flags, paths
from vlp.core.appended import Appended
from vlp.core.chips import processor
from vlp.core.config import difference
from vlp.runtime import restart
from vlp.runtime.sinks import Sink

log = logging.getLogger(__name__)
# What a run writes. None may be a symbolic link, which would lead out of the workdir (checkpoints/ may: large disks).
_WRITTEN = {
    ".lock", "config.json", "versions.json", "preprocessing.json", "saved.json", "tokenizer.model", "metrics.jsonl",
    "parameters.txt", "rollbacks.json", "evals", "heartbeats", "profile", "tensorboard", "clu", "wandb",
}  # fmt: skip
LEASE = ".lease"  # in a store: who writes in the workdir (lock.py)
MAX_CHANGES = 4  # of a config that an error names
SHARED = ".shared"  # suffix of the file that tests whether hosts share the workdir; caches may show it after its end


class Metrics:
    """metrics.jsonl: one JSON object per line, written by process 0.

    A start drops the rows after the restored step. sinks: each is given every row as it is written.
    """

    def __init__(self, path: paths.Path, restored_step: int | None, sinks: Sequence[Sink] = ()):
        self._active = jax.process_index() == 0
        self.begun: list[dict[str, Any]] = []  # rows from before this start
        if not self._active:
            return
        rows = read(path)
        if restored_step and not rows:
            log.warning("%s is missing; a new one begins at step %d", path, restored_step)
        kept = [r for r in rows if r["step"] <= (restored_step or 0)]
        if rows and not restored_step:  # from a start that saved no checkpoint
            aside = _unused(path)
            appended.rename(path, aside)
            log.warning("%s: from a start that saved no checkpoint; kept as %s", path, aside.name)
        self._file = Appended(path, "".join(dump(row) + "\n" for row in kept).encode())
        self._sinks, self.begun = sinks, kept
        for sink in sinks:
            sink.begin(kept)

    def write(self, row: dict[str, Any]) -> None:
        if self._active:
            self._file.write(dump(row) + "\n")
            for sink in self._sinks:
                sink.write(row)

    def flush(self) -> None:
        """Writes every row to disk; called before a checkpoint, which counts on them."""
        if self._active:
            self._file.flush()
            for sink in self._sinks:
                sink.flush()

    def close(self) -> None:
        if self._active:
            self.flush()
            self._file.close()
            for sink in self._sinks:
                sink.close()


def dump(value: Any, indent: int | None = None) -> str:
    """Returns JSON, with NaN and infinities as strings."""

    def safe(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: safe(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [safe(x) for x in v]
        return str(v) if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(safe(value), indent=indent, ensure_ascii=False)


def read(path: paths.Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without incomplete lines (logged, unless it is the last line)."""
    rows = []
    text = appended.read(path).decode(errors="replace")
    lines = text.split("\n")  # names may hold other line separators
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line and number < len(lines):
            log.warning("%s: line %d is broken; left out", path, number)
    return rows


def write_json(path: paths.Path, value: Any) -> None:
    """Writes atomically, on process 0."""
    write_bytes(path, (dump(value, indent=1) + "\n").encode())


def write_bytes(path: paths.Path, data: bytes) -> None:
    """Writes atomically, on process 0."""
    if jax.process_index() == 0:
        paths.write(path, data)


def write_artefact(workdir: paths.Path, name: str, value: Any) -> None:
    """Writes evals/NAME.json. Names come from data (splits, labels): characters that could leave it are replaced."""
    safe = re.sub(r"[^\w.+-]", "_", name).lstrip(".")[:100]
    if safe != name:
        safe += "-" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    folder = workdir / "evals"
    if os.path.islink(folder):
        raise check.error(str(folder), "a symbolic link", "a directory of the run", "remove it")
    write_json(folder / f"{safe}.json", value)


def _unused(path: paths.Path) -> paths.Path:
    """Returns an unused name in the file's folder: metrics_aside_1.jsonl."""
    there = {p.name for p in paths.listing(path.parent)}
    number = 1
    while (other := path.with_stem(f"{path.stem}_aside_{number}")).name in there:
        number += 1
    return other


def begun(workdir: paths.Path) -> bool:
    """Returns whether a run recorded a step or saved a checkpoint."""
    return bool(read(workdir / "metrics.jsonl")) or any(
        "step_" in p.name for p in paths.listing(workdir / "checkpoints")
    )


def check_links(workdir: paths.Path) -> None:
    """Raises UserError if something that a run writes is a symbolic link. A store has none."""
    if paths.is_remote(workdir):
        return
    folders = (workdir, workdir / "evals", workdir / "heartbeats")
    for path in (p for folder in folders for p in paths.listing(folder)):
        ours = path.name in _WRITTEN or path.suffix == ".partial" or path.parent != workdir
        if os.path.islink(path) and (ours or path.name.startswith(("quarantine_", "nonfinite_"))):
            raise check.error(str(path), "a symbolic link", "a file of the run", "remove it")


def check_saved(workdir: paths.Path) -> None:
    """Raises UserError if a run saved checkpoints here. Call it if there are none now."""
    if paths.is_file(workdir / "saved.json"):
        do = "bring the checkpoints back, or choose another --workdir to begin again"
        got = "no checkpoint of a run that saved some (see saved.json)"
        raise check.error(f"--workdir {workdir}", got, "its checkpoints", do)


def latest(workdir: paths.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's config, or the workdir's if the run was extended since (evaluators, length)."""
    try:
        later = json.loads(paths.read(workdir / "config.json"))
        same = not difference(restart.extendable(config), restart.extendable(later))
    except (OSError, ValueError, AttributeError, TypeError):
        return config
    return later if same else config


def check_reachable(where: str, workdir: paths.Path) -> None:
    """Raises UserError if a store's bucket does not exist or may not be read. Local folders are checked elsewhere."""
    if not paths.is_remote(workdir):
        return
    try:
        paths.check_bucket(workdir)
    except OSError as e:
        do = "create the bucket, or correct its name and the credentials"
        raise check.error(where, f"{str(workdir)!r} ({e.strerror})", "a bucket", do) from None


def check_config(workdir: paths.Path, config: dict[str, Any], extend: bool = False) -> None:
    """Raises UserError if the workdir holds a run of another config, or other files.

    extend: the last stage's length may differ.
    """
    check_path("--workdir", workdir)
    check_reachable("--workdir", workdir)
    if not os.path.isfile(workdir) and not paths.is_remote(workdir):
        check.output_dir("--workdir", os.fspath(workdir))
    check_links(workdir)
    path = workdir / "config.json"
    if not paths.exists(path):
        if os.path.exists(workdir) and not os.path.isdir(workdir):
            do = "choose another --workdir"
            raise check.error(f"--workdir {workdir}", "a file", "a directory", do)
        if paths.is_dir(workdir / "checkpoints"):
            do = "bring it back (each checkpoint's meta holds the config), or choose another --workdir"
            raise check.error(f"--workdir {workdir}", "a run without config.json", "its config", do)
        ours = lambda p: p.suffix == SHARED or p.name == LEASE
        if not all(map(ours, paths.listing(workdir))):
            do = "choose an empty or new directory"
            raise check.error(
                f"--workdir {workdir}", "a directory with other files", "a run or nothing", do
            )
        return
    try:
        old = json.loads(paths.read(path))
        if not isinstance(old, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        do = "bring it back (each checkpoint's meta holds the config), or choose another --workdir"
        raise check.error(str(path), "a broken file", "the run's config", do) from None
    config = json.loads(dump(config))  # as stored: infinities are strings
    changes = difference(restart.fixed(old), restart.fixed(config))
    extends = bool(changes) and not difference(restart.extendable(old), restart.extendable(config))
    if changes and not begun(workdir):
        log.info("--workdir %s: its run took no step; begun again with this config", workdir)
        return
    if changes and extend:
        changes = difference(restart.extendable(old), restart.extendable(config))
    if changes:
        more = f" and {len(changes) - MAX_CHANGES} more" if len(changes) > MAX_CHANGES else ""
        do = "choose another --workdir, or the run's own config"
        if extend:
            do += " (--extend allows another length of the last stage)"
        elif extends:
            do += "; --extend continues with this one"
        raise check.error(
            f"--workdir {workdir}",
            f"a run with another config ({', '.join(changes[:MAX_CHANGES])}{more})",
            "the same, but for what does not change its numbers (mesh, evaluators, logging, saving, workers …)",
            do,
        )


def code_versions() -> dict[str, Any]:
    """Returns the versions of packages and the git commit. Starts no device."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"vlp": __version__, "git": _git(), "python": platform.python_version(), **found}


def versions() -> dict[str, Any]:
    """Returns what results depend on besides the config: packages, git commit, device, flags of JAX and XLA."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        **code_versions(),
        "platform": devices[0].platform,
        "device": f"CPU ({processor()[0]})" if kind == "cpu" else kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "flags": flags.recorded(),
    }


def _git() -> str:
    """Commit of the source tree, "+" if it has changes; empty outside a repository."""
    here = pathlib.Path(__file__).parent
    run = lambda *args: subprocess.run(
        ["git", "--no-optional-locks", "-C", here, *args],
        capture_output=True,
        text=True,
        timeout=20,
    )
    try:
        commit = run("rev-parse", "HEAD")
        changed = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit.stdout.strip() + ("+" if changed else "") if commit.returncode == 0 else ""


def encode_bytes(data: bytes) -> str:
    return base64.b64encode(data).decode()
