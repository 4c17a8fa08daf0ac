"""The training loop: data, step, log, evaluate, save. One for every method, stage and machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vlp.ckpt import init_from
from vlp.ckpt.manager import Checkpoints
from vlp.core import check, tree
from vlp.core import mesh as meshes
from vlp.core.config import plain
from vlp.core.types import Apply
from vlp.data.loader import Dataset, open_dataset
from vlp.evals import io as ios
from vlp.evals.io import IO
from vlp.infer.load import load
from vlp.optim import make as optimisers
from vlp.train import state as states
from vlp.train import workdir as files
from vlp.train.stages import Run, Stage, parse
from vlp.train.state import State
from vlp.train.step import is_finite, train_step
from vlp.train.watchdog import PREEMPTED, Stop, Watchdog

log = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Session:
    """What all stages share."""

    config: dict[str, Any]
    settings: Run
    workdir: pathlib.Path
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: files.Metrics
    stop: Stop
    watchdog: Watchdog
    versions: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A stage made ready: its data, optimiser, teachers' models, its state's shapes and shardings, compiled step."""

    stage: Stage
    datasets: Mapping[str, Dataset]  # "" is the main stream
    updater: optimisers.Updater
    teachers: Mapping[str, tuple[Any, float | None]]
    abstract: State
    step: Any

    @property
    def main(self) -> Dataset:
        return self.datasets[""]


def run(config: Mapping[str, Any], directory: str | pathlib.Path) -> int:
    """Trains, or continues, the run of `config` in `directory`. Returns the exit code: 0, or 75 if pre-empted."""
    config = plain(config)
    settings, stages = parse(config)
    workdir = pathlib.Path(directory).absolute()
    files.check_config(workdir, config)
    check_platform(settings.platform)
    mesh = meshes.make(settings.mesh)
    with jax.set_mesh(mesh), Stop() as stop:
        all_parts = [prepare(stage, settings, mesh) for stage in stages]
        meta = last_meta(workdir)
        position = meta["position"] if meta else {"step": 0, "stage": 0, "stage_step": 0}
        check_start(all_parts, position, meta)
        session = open_session(config, settings, workdir, mesh, stop, all_parts[0], position)
        state, total = None, stages[-1].start_step + stages[-1].num_steps
        try:
            for parts in all_parts[position["stage"] :]:
                state = enter(session, parts, state, position if state is None else None)
                state = train_stage(session, parts, state)
                if int(state.step) < total and stop.asked(int(state.step)):
                    log.info(
                        "stopped at step %d and saved; the same command continues", int(state.step)
                    )
                    return PREEMPTED
            log.info("done: %s", workdir)
            return 0
        finally:
            session.metrics.close()
            session.watchdog.close()
            session.checkpoints.close()


def prepare(stage: Stage, settings: Run, mesh: Mesh) -> Parts:
    """Opens a stage's data and checks everything that can be checked without compiling or writing."""
    meshes.check_batch(stage.batch, mesh, stage.micro_batches)
    datasets = {"": open_dataset(stage.data)}
    for name, stream in stage.streams.items():
        meshes.check_batch(stream.batch, mesh, where=f"config.streams.{name}.batch")
        datasets[name] = open_dataset(stream.data)
    check_text(stage, datasets[""])
    boxed = states.abstract_params(stage.model, stage.data.image_px, stage.data.text_len)
    updater = optimisers.make(stage.optim, nn.unbox(boxed))
    teachers = {}
    for name, teacher in stage.teachers.items():
        teachers[name] = (
            load(teacher.path).apply.model if teacher.path else stage.model,
            teacher.decay,
        )
    step = functools.partial(
        train_step,
        model=stage.model,
        objective=stage.objective,
        updater=updater,
        lr_at=stage.schedule.at(stage.batch, stage.num_steps),
        seed=settings.seed,
        num_micro=stage.micro_batches,
        teachers=teachers,
    )
    state = abstract_state(stage, updater, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))
    parts = Parts(stage, datasets, updater, teachers, state, compiled)
    batch = abstract_batch(parts)
    missing = stage.objective.reads - set(batch)
    if missing:
        raise check.error(
            "config.objective",
            f"no batch leaf {sorted(missing)}",
            sorted(batch),
            "change config.data",
        )
    compiled.eval_shape(state, batch)  # the trace is kept for the first step
    for label, evaluator in stage.evals.items():
        io = IO(stage.data, parts.main.tokenizer)
        ios.check_ready(evaluator, stage.model, mesh, io, f"config.evals.{label}")
    return parts


def check_start(
    all_parts: Sequence[Parts], position: Mapping[str, int], meta: Mapping[str, Any] | None
) -> None:
    """Raises UserError for data unlike the checkpoint's, and for parameters that a later stage could not take over."""
    if meta:
        found = description_of_data(all_parts[position["stage"]])
        for key, value in found.items():
            if meta.get(key, value) != value:
                do = "bring back the run's data, or start a new --workdir"
                raise check.error("config.data", f"other {key}", "the checkpoint's", do)
    for previous, parts in zip((None, *all_parts), all_parts):
        stage = parts.stage
        if stage.index < position["stage"] or (stage.index == position["stage"] and meta):
            continue  # already entered
        where = f"stage {stage.name!r}"
        if previous is not None:
            init_from.check_fits(previous.abstract.params, parts.abstract.params, where)
            if stage.carry_optimizer and not same_shapes(previous.abstract.opt, parts.abstract.opt):
                do = "set carry_optimizer=False for this stage"
                raise check.error(
                    where, "an optimiser state of other shapes", "the stage before's", do
                )
        if stage.init:
            params = load(stage.init).apply.params
            init_from.check_fits(params, parts.abstract.params, f"{where}: init from {stage.init}")


def enter(
    session: Session, parts: Parts, previous: State | None, position: dict[str, Any] | None
) -> State:
    """The state at the point where training goes on: restored, carried over from the stage before, or fresh."""
    stage, mesh = parts.stage, session.mesh
    files.write_json(session.workdir / "preprocessing.json", plain(stage.data))
    if position is not None and position["stage_step"] > 0:
        return restore(session, parts, position["step"])
    where = f"stage {stage.name!r}"
    if previous is not None and same_shapes(previous.params, parts.abstract.params):
        params = previous.params
    else:
        px, length = stage.data.image_px, stage.data.text_len
        params = states.init_params(stage.model, px, length, session.settings.seed, mesh)
        if previous is not None:
            params = init_from.carry(previous.params, params, where)
    if stage.init:
        params = init_from.carry(
            load(stage.init).apply.params, params, f"{where}: init from {stage.init}"
        )
    teachers = {}
    for name, teacher in stage.teachers.items():
        if teacher.path:
            teachers[name] = jax.device_put(
                load(teacher.path).apply.params, meshes.replicated(mesh)
            )
        elif teacher.decay is not None and previous is not None and name in previous.teachers:
            teachers[name] = init_from.carry(
                previous.teachers[name], params, f"{where}: teacher {name!r}"
            )
        else:
            teachers[name] = jax.tree.map(jnp.copy, params)
    extra = init_extra(stage, session.settings.seed)
    if previous is not None and same_shapes(previous.extra, extra):
        extra = previous.extra
    state = states.create(params, parts.updater, teachers, extra, stage.start_step)
    if stage.carry_optimizer and previous is not None:
        state = state.replace(opt=previous.opt)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, parts.abstract))


def train_stage(session: Session, parts: Parts, state: State) -> State:
    """Trains to the stage's end, or until asked to stop; the state returned is saved."""
    stage, settings = parts.stage, session.settings
    first = int(state.stage_step)
    batches = feed(parts, settings.seed, first, session.mesh)
    bar = tqdm(
        total=stage.num_steps, initial=first, desc=stage.name, unit="step", disable=None, leave=True
    )
    clock = Clock(stage.batch)
    pending: tuple[int, Any] | None = None  # metrics of the step before, read while this one runs

    def record() -> None:
        if pending is not None:
            write_step(session, parts, *pending, clock, bar)

    for number in range(first, stage.num_steps):
        session.watchdog.beat("data")
        batch = clock.wait(lambda: next(batches))
        session.watchdog.beat("step")
        state, metrics = parts.step(state, batch)
        record()
        pending = (number + 1, metrics)
        bar.update()
        step, last = stage.start_step + number + 1, number + 1 == stage.num_steps
        stopping = session.stop.asked(step)
        due = [
            n
            for n, e in stage.evals.items()
            if last or (e.every_steps and step % e.every_steps == 0)
        ]
        saving = last or stopping or step % settings.save_every_steps == 0
        if due or saving:
            record()
            pending = None
            with clock.paused():
                for label in due:
                    evaluate(session, parts, state, label, step)
                if saving:
                    save(session, parts, state, number + 1)
        if stopping:
            break
    bar.close()
    return state


def evaluate(session: Session, parts: Parts, state: State, label: str, step: int) -> None:
    """Runs one evaluator on the present parameters and records what it yields."""
    stage = parts.stage
    session.watchdog.beat(f"eval {label}")
    began = time.monotonic()
    params = state.params if stage.eval_params == "student" else state.teachers[stage.eval_params]
    write = lambda name, value: files.write_json(
        session.workdir / "evals" / f"{name}.json", {"step": step} | value
    )
    io = IO(stage.data, parts.main.tokenizer, write)
    results = list(stage.evals[label](Apply(stage.model, params), session.mesh, io))
    samples = stage.start_samples + (step - stage.start_step) * stage.batch
    row: dict[str, Any] = {
        "kind": "eval",
        "step": step,
        "samples": samples,
        "stage": stage.name,
        "eval": label,
    }
    row |= {r.metric: r.value for r in results} | dict(results[0].provenance if results else {})
    session.metrics.write(row | {"time/eval_s": round(time.monotonic() - began, 3)})
    text = "  ".join(f"{r.metric} {r.value:.4g}" for r in results)
    tqdm.write(f"[{step}] {label}: {text}")


def save(session: Session, parts: Parts, state: State, stage_step: int) -> None:
    """Puts the metrics on disk, then starts a checkpoint that claims them."""
    session.watchdog.beat("save")
    session.metrics.flush()
    stage = parts.stage
    step = stage.start_step + stage_step
    samples = stage.start_samples + stage_step * stage.batch
    position = {"step": step, "stage": stage.index, "stage_step": stage_step, "samples": samples}
    meta = {"position": position, **description(session, parts)}
    rest = {k: getattr(state, k) for k in ("step", "stage_step", "opt", "teachers", "extra")}
    session.checkpoints.save(step, state.params, rest, meta)


def description(session: Session, parts: Parts) -> dict[str, Any]:
    """All that is needed to use the parameters elsewhere."""
    tokenizer = parts.main.tokenizer
    return {
        "config": session.config,
        "stage": parts.stage.index,
        "tokenizer": files.encode_bytes(tokenizer.to_bytes()),
        "preprocessing": plain(parts.stage.data),
        "versions": session.versions,
        **description_of_data(parts),
    }


def description_of_data(parts: Parts) -> dict[str, Any]:
    """What must be the same when the run goes on."""
    return {
        "tokenizer_sha256": parts.main.tokenizer.sha256,
        "fingerprints": {name: data.fingerprint for name, data in parts.datasets.items()},
    }


def restore(session: Session, parts: Parts, step: int) -> State:
    """The state of a checkpoint, in this run's shardings."""
    target = parts.abstract
    rest = {k: getattr(target, k) for k in ("step", "stage_step", "opt", "teachers", "extra")}
    params, rest = session.checkpoints.restore(step, target.params, rest)
    log.info("restored step %d", step)
    return State(params=params, **rest)


def last_meta(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the newest whole checkpoint says of itself; None if there is no checkpoint."""
    if not (workdir / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(workdir / "checkpoints", create=False)
    step = checkpoints.newest()
    return None if step is None else checkpoints.meta(step)


def open_session(
    config: dict[str, Any],
    settings: Run,
    workdir: pathlib.Path,
    mesh: Mesh,
    stop: Stop,
    first: Parts,
    position: Mapping[str, int],
) -> Session:
    """Makes the workdir, or opens it to go on from `position`. Nothing was written before this."""
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep_checkpoints)
    checkpoints.set_aside_after(position["step"])
    versions = files.versions()
    files.write_json(workdir / "config.json", config)
    files.write_json(workdir / "versions.json", versions)
    if jax.process_index() == 0:
        (workdir / "tokenizer.model").write_bytes(first.main.tokenizer.to_bytes())
    metrics = files.Metrics(workdir / "metrics.jsonl", position["step"])
    session = Session(
        config,
        settings,
        workdir,
        mesh,
        checkpoints,
        metrics,
        stop,
        Watchdog(settings.hang_secs),
        versions,
    )
    num = tree.size(
        states.abstract_params(
            first.stage.model, first.stage.data.image_px, first.stage.data.text_len
        )
    )
    log.info(
        "%s: %s parameters on %s × %s",
        config["name"],
        f"{num:,}",
        versions["devices"],
        versions["device"],
    )
    log.info(
        "data: %s records, %s",
        f"{first.main.num_records:,}",
        first.stage.data.path or first.stage.data.source,
    )
    log.info("%s", optimisers.table(first.stage.optim.rules, first.abstract.params))
    return session


def feed(parts: Parts, seed: int, stage_step: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Global device batches from a stage's step on: the samples are a function of how many were seen."""
    stage = parts.stage
    hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
    streams: dict[str, Iterator[dict[str, np.ndarray]]] = {}
    for name, data in parts.datasets.items():
        batch = stage.streams[name].batch if name else stage.batch
        start = (stage.streams[name] if name else stage).start_samples + stage_step * batch
        streams[name] = data.train_iter(
            start=start, batch=batch, num_batches=stage.num_steps - stage_step, seed=seed, **hosts
        )
    for rows in zip(*streams.values()):
        named = {
            f"{n}.{k}" if n else k: v for n, leaves in zip(streams, rows) for k, v in leaves.items()
        }
        yield meshes.to_global(named, mesh)


def write_step(
    session: Session, parts: Parts, number: int, metrics: Any, clock: Clock, bar: Any
) -> None:
    """Records one step's metrics if it is due; stops the run if they are no numbers."""
    stage, settings = parts.stage, session.settings
    clock.count()
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    step = stage.start_step + number
    seen = stage.start_samples + number * stage.batch
    row = {"kind": "train", "step": step, "samples": seen, "stage": stage.name, **values}
    if not is_finite(values):
        session.metrics.write(row)
        session.metrics.flush()
        ids = parts.main.record_ids(seen - stage.batch, stage.batch, settings.seed)
        keys = parts.main.keys(ids[:64])
        path = session.workdir / f"nonfinite_step{step}.json"
        files.write_json(
            path, {"step": step, "metrics": values, "records": ids.tolist(), "keys": keys}
        )
        got = ", ".join(f"{k} {values[k]}" for k in ("loss", "grad_norm", "param_norm"))
        raise FloatingPointError(
            f"step {step}: got {got}, expected finite numbers; see {path} for the batch "
            f"(keys {', '.join(keys[:4])}, …), lower the learning rate or look at the data"
        )
    if number % settings.log_every_steps == 0 or number == stage.num_steps:
        times = clock.read()
        session.metrics.write(row | times)
        rate, wait = times["time/examples_per_s"], times["time/data_wait_frac"]
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {rate:.0f} examples/s, waiting for data {wait:.0%}"
        )
        if bar.disable:
            left = (stage.num_steps - number) * stage.batch / max(rate, 1e-9)
            log.info(
                "[%d] %s %d/%d  loss %.4f  %.0f examples/s  %.0f s left  data wait %.0f%%",
                step, stage.name, number, stage.num_steps, values["loss"], rate, left, 100 * wait,
            )  # fmt: skip


class Clock:
    """Steps since the last reading, time in all, and time waiting for data."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._began = self._mark = time.monotonic()
        self._waited = 0.0
        self._steps = 0

    def wait(self, get: Any) -> Any:
        before = time.monotonic()
        value = get()
        self._waited += time.monotonic() - before
        return value

    def count(self) -> None:
        """One more step was done."""
        self._steps += 1

    def paused(self) -> Any:
        """Inside `with`, time does not count (evaluation, saving)."""
        return _Paused(self)

    def shift(self, secs: float) -> None:
        self._mark += secs

    def read(self) -> dict[str, float]:
        now = time.monotonic()
        span = max(now - self._mark, 1e-9)
        out = {
            "time/examples_per_s": round(self._steps * self._batch / span, 3),
            "time/data_wait_frac": round(min(self._waited / span, 1.0), 4),
            "time/elapsed_s": round(now - self._began, 3),
        }
        self._mark, self._waited, self._steps = now, 0.0, 0
        return out


class _Paused:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._clock.shift(time.monotonic() - self._began)


def abstract_state(stage: Stage, updater: optimisers.Updater, mesh: Mesh) -> State:
    """Shapes and shardings of a stage's state."""
    px, length = stage.data.image_px, stage.data.text_len
    params = nn.unbox(states.abstract_params(stage.model, px, length))
    teachers = {}
    for name, teacher in stage.teachers.items():
        teachers[name] = params
        if teacher.path:
            loaded = load(teacher.path)
            teachers[name] = jax.eval_shape(lambda tree: tree, loaded.apply.params)
    create = functools.partial(states.create, updater=updater, step=0)
    extra = jax.eval_shape(lambda: init_extra(stage, 0))
    state = jax.eval_shape(lambda p, t, e: create(p, teachers=t, extra=e), params, teachers, extra)
    shardings = states.shardings(stage.model, px, length, updater, state, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def abstract_batch(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, from one real row of each stream."""
    out = {}
    for name, data in parts.datasets.items():
        size = parts.stage.streams[name].batch if name else parts.stage.batch
        for key, rows in data.batch_at(0, 1, 0).items():
            out[f"{name}.{key}" if name else key] = jax.ShapeDtypeStruct(
                (size, *rows.shape[1:]), rows.dtype
            )
    return out


def init_extra(stage: Stage, seed: int) -> PyTree:
    """The objective's own arrays at the start, if it has any."""
    init = getattr(stage.objective, "init_extra", None)
    return () if init is None else init(jax.random.fold_in(jax.random.key(seed), stage.index))


def same_shapes(a: PyTree, b: PyTree) -> bool:
    shapes = lambda t: (jax.tree.structure(t), [x.shape for x in jax.tree.leaves(t)])
    return shapes(a) == shapes(b)


def check_text(stage: Stage, data: Dataset) -> None:
    """The model's vocabulary and special tokens against the tokenizer's."""
    tower = getattr(stage.model, "text_tower", None)
    if tower is None:
        return
    ours, theirs = (tower.pad_id, tower.eos_id), (data.tokenizer.pad_id, data.tokenizer.eos_id)
    if tower.vocab < data.tokenizer.vocab_size:
        do = f"set config.model.text_tower.vocab to {data.tokenizer.vocab_size} or more"
        raise check.error(
            "config.model.text_tower.vocab",
            tower.vocab,
            f"the tokenizer's {data.tokenizer.vocab_size} or more",
            do,
        )
    if ours != theirs:
        raise check.error(
            "config.model.text_tower pad_id, eos_id",
            ours,
            f"the tokenizer's {theirs}",
            "change them",
        )


def check_platform(wanted: str) -> None:
    """Never train on another kind of device than the config asks for."""
    found = jax.default_backend()
    if wanted and wanted != found:
        do = (
            "check the installation (pip install 'vlp[tpu]' or 'vlp[cuda]'), or set config.platform"
        )
        raise check.error("config.platform", f"{found} devices", wanted, do)
