"""Compiles the training step of a stage, for devices that need not be here, and reads what the compiler reports."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from vlp.core import check, flops
from vlp.core import mesh as meshes
from vlp.core.chips import CHIPS, MAX_SIMULATED
from vlp.core.types import Apply, Ctx
from vlp.plan import hlo
from vlp.train.build import StagePlan, assemble
from vlp.train.metrics import context, loss, own_flops
from vlp.train.stages import Run, Stage

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for: a TPU topology, simulated CPU devices, or those of this machine.

    stands_for: the kind of device that these replace; "": none. With a replacement the plan is only an estimate.
    """

    name: str
    devices: Sequence[Any]
    stands_for: str = ""

    @property
    def kind(self) -> str:
        return self.stands_for or self.devices[0].device_kind

    @property
    def hbm_bytes(self) -> int | None:
        return CHIPS[self.kind].hbm_bytes if self.kind in CHIPS else None


# libtpu as a compiler without a TPU: no request to a metadata server, several processes may load it, few messages.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def topology(name: str, slices: int = 1) -> Target:
    """Returns a TPU pod that need not be here: "v5e:16x16", or several slices of it. Needs libtpu, but no TPU."""
    from jax.experimental import topologies

    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        kwargs = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **kwargs)
    except Exception as e:
        text = str(e).splitlines()[0][:120]
        if any(w in text for w in ("libtpu", "No module", "platform", "not installed")):
            do = "pip install 'vlp[tpu]'"
            raise check.error("--topology", text, "the TPU compiler (libtpu)", do) from None
        do = "give a generation and a grid, such as v5e:16x16, v5p:8x8x8 or v6e:16x16"
        raise check.error("--topology", f"{name!r} ({text})", "a TPU topology", do) from None
    devices = found.devices
    if devices[0].device_kind == "TPU v4":  # two cores work as one device; the description has both
        devices = [d for d in devices if d.core_on_chip == 0]
    return Target(name if slices == 1 else f"{slices} × {name}", devices)


def target(name: str = "", slices: int = 1, num_cpu: int = 0, gpus: str | None = None) -> Target:
    """Returns the devices that a plan is for. Must be called before JAX starts a backend.

    Args:
        name: a TPU topology, such as "v5e:16x16".
        slices: number of slices of the topology.
        num_cpu: number of simulated CPU devices.
        gpus: "" for the GPUs of this machine (8 × H100 if it has none), or kind and number, such as "H100:8", which
            need not be here.

    Raises:
        UserError: nothing is given, a number is out of range, or the topology or the kind is unknown.
    """
    if slices < 1 or num_cpu < 0 or not (name or num_cpu or gpus is not None):
        do = "give --slices 1 or more, and --devices, --topology or --gpu"
        raise check.error("--slices, --devices", (slices, num_cpu), "1 or more", do)
    if name:
        return topology(name, slices)
    if num_cpu:
        jax.config.update("jax_num_cpu_devices", num_cpu)
        return Target(f"{num_cpu} CPU devices", jax.devices("cpu"))
    imagined = _imagined(gpus or "H100:8")
    if gpus or jax.default_backend() != "gpu":
        return imagined()
    return Target(f"{jax.device_count()} GPUs", jax.devices())


def _imagined(gpus: str) -> Callable[[], Target]:
    """Returns CPU devices in place of GPUs such as "H100:8"; sets their number, which must precede JAX's start."""
    name, _, count = gpus.partition(":")
    known = [kind for kind in CHIPS if "TPU" not in kind]
    kinds = [kind for kind in known if name.lower() in kind.lower()]
    if not name or not kinds:
        raise check.unknown("--gpu", name, known)
    num = int(count or 1) if (count or "1").isdecimal() else 0
    if not 1 <= num <= MAX_SIMULATED:
        do = f"give, for instance, --gpu {name}:8"
        raise check.error("--gpu", repr(gpus), f"a kind and a number up to {MAX_SIMULATED}", do)
    jax.config.update("jax_num_cpu_devices", num)
    name = f"{num} × {kinds[0]} (imagined)"
    return lambda: Target(name, jax.devices("cpu"), stands_for=kinds[0])


# GiB that XLA leaves for a program, as in the errors of the TPU compiler.
USABLE = {"TPU v5 lite": 15.75, "TPU v6 lite": 31.25, "TPU v5": 95.74}


def usable_bytes(target: Target) -> float:
    """Returns the bytes of one device that a program may use; infinite if they are not known."""
    if target.kind in USABLE:
        return USABLE[target.kind] * 2**30
    return 0.95 * target.hbm_bytes if target.hbm_bytes else float("inf")


def measure(plan: StagePlan, mesh: Mesh, target: Target) -> dict[str, Any]:
    """Compiles the step.

    Args:
        plan: the stage, assembled for `mesh`.
        mesh: of the target's devices.
        target: the devices.

    Returns:
        A flat row: bytes per device, FLOPs, traffic. `fits` is the compiler's verdict.
    """
    row = describe(plan, mesh, target) | step_flops(plan, mesh)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = plan.step.lower(plan.abstract, plan.batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            row |= {"fits": False, "compile_s": round(time.monotonic() - began, 1)}
            return row | {"refusal": refusal(str(e))}
    memory = compiled.memory_analysis()
    row |= {"fits": True, "compile_s": round(time.monotonic() - began, 1)}
    on_tpu = "TPU" in target.kind  # other compilers report a peak without the arguments, or none
    row["peak_bytes"] = (
        memory.peak_memory_in_bytes
        if on_tpu
        else memory.argument_size_in_bytes + memory.temp_size_in_bytes
    )
    row["temp_bytes"] = memory.temp_size_in_bytes
    row["kept_bytes"] = kept_bytes(plan, mesh)
    held = row["param_bytes"] + row["opt_bytes"] + row["batch_bytes"] + row["kept_bytes"]
    row["working_bytes"] = max(0, row["peak_bytes"] - held)
    for kind, traffic in hlo.collectives(compiled.as_text(), len(target.devices)).items():
        row[f"collectives/{kind}"] = traffic.count
        row[f"sent_bytes/{kind}"] = round(traffic.sent_bytes)
    return row


def describe(plan: StagePlan, mesh: Mesh, target: Target) -> dict[str, Any]:
    """Returns the columns that are known before compiling or tracing."""
    return {
        "target": target.name,
        "chips": len(target.devices),
        "device": target.kind,
        "hbm_bytes": target.hbm_bytes,
        "mesh": " × ".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "1 device",
        "batch": plan.stage.batch,
        "micro_batches": plan.stage.micro_batches,
        "remat": remat_of(plan.stage),
        **state_bytes(plan),
    }


def measure_parts(plan: StagePlan, mesh: Mesh) -> dict[str, Any]:
    """Measures the objective's loss alone, with the results of its forward passes given, and one evaluation batch."""
    stage = plan.stage
    rows = meshes.batch_sharding(mesh)
    place = lambda tree, sharding: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    params, batch = plan.abstract.params, dict(plan.batch)
    with jax.set_mesh(mesh):
        mapped = jax.eval_shape(functools.partial(_mapped, stage), params, batch)
        grad = jax.grad(lambda given, p, b: _loss_of(stage, given, p, b))
        alone = _compile(grad, place(mapped, rows), params, batch)
        out = {f"loss_{k}": v for k, v in alone.items()}
        if stage.evals:
            num = max(e.batch for e in stage.evals.values())
            few = {
                k: jax.ShapeDtypeStruct((num, *v.shape[1:]), v.dtype, sharding=rows)
                for k, v in batch.items()
                if k in ("image", "text")
            }
            out |= {
                f"eval_{k}": v
                for k, v in _compile(functools.partial(_answer, stage), params, few).items()
            }
    return out


def _compile(f: Any, *args: Any) -> dict[str, int]:
    memory: Any = jax.jit(f).lower(*args).compile().memory_analysis()
    return {"peak_bytes": memory.peak_memory_in_bytes, "temp_bytes": memory.temp_size_in_bytes}


def _answer(stage: Stage, params: PyTree, batch: Mapping[str, Any]) -> list[Any]:
    """Returns what the evaluators ask of the model for one batch."""
    apply = Apply(stage.model, params)
    text = batch["text"] if batch["text"].ndim == 2 else batch["text"][:, 0]
    asked = [e.asks for e in stage.evals.values() if hasattr(e, "asks")]
    return [asks(apply, batch["image"], text) for asks in asked]


@dataclasses.dataclass(frozen=True)
class _Given(Ctx):
    """A step whose forward passes are done: `map` returns the given results, in order."""

    given: Any = ()  # an iterator

    def map(self, f: Any, *arrays: PyTree) -> PyTree:
        return next(self.given)


@dataclasses.dataclass(frozen=True)
class _Noted(Ctx):
    """A step that records what its forward passes return."""

    notes: Any = None  # a list

    def map(self, f: Any, *arrays: PyTree) -> PyTree:
        out = Ctx.map(self, f, *arrays)
        self.notes.append(out)
        return out


def _mapped(stage: Stage, params: PyTree, batch: Mapping[str, Any]) -> list[Any]:
    notes: list[Any] = []
    stage.objective(context(stage, stage.model, params, batch, 1, _Noted, notes=notes))
    return notes


def _loss_of(stage: Stage, given: list[Any], params: PyTree, batch: Mapping[str, Any]) -> Any:
    ctx = context(stage, stage.model, params, batch, 1, _Given, given=iter(given))
    return stage.objective(ctx).loss()


def refusal(text: str) -> str:
    """Returns the compiler's reason in one line. Raises RuntimeError for any reason but too little memory: a bug."""
    if "RESOURCE_EXHAUSTED" not in text:
        raise RuntimeError(text)
    found = re.search(
        r"(\(?[\d.]+[KMGT]\)? exceeds available HBM \([\d.]+[KMGT]\)|Used [\d.]+[KMGT] of [\d.]+[KMGT])",
        text,
    )
    return found.group(1) if found else text.splitlines()[0][:160]


def shard_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree of sharded arrays on one device."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def state_bytes(plan: StagePlan) -> dict[str, int]:
    state = plan.abstract
    return {
        "param_bytes": shard_bytes(state.params),
        "opt_bytes": shard_bytes((state.opt, state.teachers, state.method_state)),
        "batch_bytes": shard_bytes(dict(plan.batch)),
    }


def remat_of(stage: Stage) -> str:
    """Returns in words what is rematerialised: in the towers, then in micro-batches."""
    found = {
        str(getattr(v, "remat", ""))
        for f in dataclasses.fields(stage.model)
        if dataclasses.is_dataclass(v := getattr(stage.model, f.name)) and hasattr(v, "remat")
    }
    micro = f" (micro-batches {stage.micro_remat})" if stage.micro_batches > 1 else ""
    return "/".join(sorted(found)) + micro


def step_flops(plan: StagePlan, mesh: Mesh) -> dict[str, float]:
    """Returns FLOPs per example: of the method, of it without masking, and of the step with rematerialisation."""
    stage = plan.stage
    model = own_flops(plan, mesh)
    out = {"flops_per_example": model, "unmasked_flops_per_example": model}
    if getattr(stage.objective, "keep_ratio", 1.0) < 1:
        whole = dataclasses.replace(stage.objective, keep_ratio=1.0)
        out["unmasked_flops_per_example"] = own_flops(plan, mesh, whole)
    step = jax.grad(lambda p, b: loss(stage, stage.model, p, b, stage.micro_batches))
    with jax.set_mesh(mesh):
        again = flops.of(step, plan.abstract.params, dict(plan.batch))
    return out | {"step_flops_per_example": again / stage.batch}


def kept_bytes(plan: StagePlan, mesh: Mesh) -> int:
    """Returns the bytes of activations that a device keeps for the backward pass.

    Counts one micro-batch if micro-batches are rematerialised.
    """
    stage = plan.stage
    again = stage.micro_batches > 1 and stage.micro_remat == "full"
    num = stage.batch // stage.micro_batches if again else stage.batch
    num_micro = 1 if again else stage.micro_batches
    resize = lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype)
    batch = {k: resize(x) for k, x in plan.batch.items() if "/" not in k} | {
        k: x for k, x in plan.batch.items() if "/" in k
    }
    f = functools.partial(loss, stage, stage.model, num_micro=num_micro)
    with jax.set_mesh(mesh):
        pull = jax.eval_shape(
            lambda p, b: jax.vjp(lambda p: f(p, b), p)[1], plan.abstract.params, batch
        )
    own = {x.shape for x in jax.tree.leaves(plan.abstract.params)}
    rows = num // num_micro
    kept = [x for x in jax.tree.leaves(pull) if x.shape not in own and x.size % rows == 0]
    return sum(x.size * x.dtype.itemsize for x in kept) // meshes.batch_ways(mesh)


def prepare(stage: Stage, settings: Run, target: Target) -> tuple[StagePlan, Mesh]:
    """Assembles a stage on the mesh of a target, without its data.

    Args:
        stage: to assemble.
        settings: of the run.
        target: the devices.

    Raises:
        UserError: the stage does not fit the mesh, for instance because its batch does not divide.
    """
    mesh = meshes.make(settings.mesh, devices=target.devices)
    with jax.set_mesh(mesh):
        return assemble(stage, settings, mesh), mesh
