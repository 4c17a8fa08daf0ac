"""A stage's real training step, compiled for devices that need not be there, and what the compiler says of it."""

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

    stands_for: the kind of device that these are in place of, if any; then there is nothing to compile for.
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


# libtpu as a compiler where no TPU is: it asks nobody for one, may be loaded by several processes, and is quiet.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def topology(name: str, slices: int = 1) -> Target:
    """A TPU pod that is not here: "v5e:16x16", or several slices of it. Needs libtpu, no TPU."""
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
        do = "write a generation and a grid, as v5e:16x16, v5p:8x8x8 or v6e:16x16"
        raise check.error("--topology", f"{name!r} ({text})", "a TPU topology", do) from None
    devices = found.devices
    if (
        devices[0].device_kind == "TPU v4"
    ):  # its two cores work as one device; the description has both
        devices = [d for d in devices if d.core_on_chip == 0]
    return Target(name if slices == 1 else f"{slices} × {name}", devices)


def target(name: str = "", slices: int = 1, num_cpu: int = 0, gpus: str | None = None) -> Target:
    """The devices that a plan is for. Called before JAX has started anything.

    gpus: "" for those of this machine (where it has none, for a node of H100), or "H100:8": so many of a kind,
    which need not be here.
    """
    if slices < 1 or num_cpu < 0 or not (name or num_cpu or gpus is not None):
        raise check.error("--slices, --devices", (slices, num_cpu), "1 or more", "write 1 or more")
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
    """GPUs that are not here, as "H100:8": CPU devices in their place, whose number is set before JAX starts."""
    name, _, count = gpus.partition(":")
    known = [kind for kind in CHIPS if "TPU" not in kind]
    kinds = [kind for kind in known if name.lower() in kind.lower()]
    if not name or not kinds:
        raise check.unknown("--gpu", name, known)
    num = int(count or 1) if (count or "1").isdecimal() else 0
    if not 1 <= num <= MAX_SIMULATED:
        do = "write it so"
        raise check.error(
            "--gpu", repr(gpus), f"a kind and a number up to {MAX_SIMULATED}, as H100:8", do
        )
    jax.config.update("jax_num_cpu_devices", num)
    name = f"{num} × {kinds[0]} (imagined)"
    return lambda: Target(name, jax.devices("cpu"), stands_for=kinds[0])


# What XLA leaves a program: measured by what the TPU compiler says it refuses.
USABLE = {"TPU v5 lite": 15.75, "TPU v6 lite": 31.25, "TPU v5": 95.74}


def usable_bytes(target: Target) -> float:
    """Memory of one device that a program may use, as far as it is known."""
    if target.kind in USABLE:
        return USABLE[target.kind] * 2**30
    return 0.95 * target.hbm_bytes if target.hbm_bytes else float("inf")


def measure(plan: StagePlan, mesh: Mesh, target: Target) -> dict[str, Any]:
    """Compiles the step. A flat row: bytes a device, FLOPs, traffic; `fits` is the compiler's verdict."""
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
    on_tpu = "TPU" in target.kind  # elsewhere the peak leaves out the arguments, or is none
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
    """What is known before anything is compiled or traced."""
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
    """The same of the objective's loss alone, given what its forward passes return, and of one evaluation batch."""
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
    """What the evaluators ask of the model for one batch."""
    apply = Apply(stage.model, params)
    text = batch["text"] if batch["text"].ndim == 2 else batch["text"][:, 0]
    asked = [e.asks for e in stage.evals.values() if hasattr(e, "asks")]
    return [asks(apply, batch["image"], text) for asks in asked]


@dataclasses.dataclass(frozen=True)
class _Given(Ctx):
    """A step whose forward passes are done: `map` answers with what is given, in order."""

    given: Any = ()  # an iterator

    def map(self, f: Any, *arrays: PyTree) -> PyTree:
        return next(self.given)


@dataclasses.dataclass(frozen=True)
class _Noted(Ctx):
    """A step that notes what its forward passes return."""

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
    """The compiler's reason in a line; anything but too much memory is a mistake of ours."""
    if "RESOURCE_EXHAUSTED" not in text:
        raise RuntimeError(text)
    found = re.search(
        r"(\(?[\d.]+[KMGT]\)? exceeds available HBM \([\d.]+[KMGT]\)|Used [\d.]+[KMGT] of [\d.]+[KMGT])",
        text,
    )
    return found.group(1) if found else text.splitlines()[0][:160]


def shard_bytes(tree: PyTree) -> int:
    """Bytes of a tree of placed arrays on one device."""
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
    """What is computed again, in words: of the towers, then of micro-batches."""
    found = {
        str(getattr(v, "remat", ""))
        for f in dataclasses.fields(stage.model)
        if dataclasses.is_dataclass(v := getattr(stage.model, f.name)) and hasattr(v, "remat")
    }
    micro = f" (micro-batches {stage.micro_remat})" if stage.micro_batches > 1 else ""
    return "/".join(sorted(found)) + micro


def step_flops(plan: StagePlan, mesh: Mesh) -> dict[str, float]:
    """FLOPs per example: the method's own, those without its masking, and all that the step as configured computes."""
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
    """Activations of the forward pass that a device holds for the backward pass (of one micro-batch, if those are
    computed again)."""
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
    """A stage on a target's mesh, checked, without its data."""
    mesh = meshes.make(settings.mesh, devices=target.devices)
    with jax.set_mesh(mesh):
        return assemble(stage, settings, mesh), mesh
