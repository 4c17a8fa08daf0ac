"""The contracts between trainer, objectives and evaluators.

An objective is a frozen dataclass of numbers that is called with a `Ctx` and returns an `Out`. It owns its forward
passes (several views, teachers, masks) and no parameters. The trainer knows no objective by name.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from vlp.core import check, mesh

PyTree = Any
KEPT = "block"  # the name of what goes into a tower's blocks, and comes out of the last (jax.ad_checkpoint)
MICRO_REMAT = {  # what the backward pass keeps of a micro-batch
    "full": jax.checkpoint_policies.nothing_saveable,
    "blocks": jax.checkpoint_policies.save_only_these_names(KEPT),
}


@struct.dataclass
class Term:
    """One term of a loss over the global batch: weight · total / count (count 0 counts as 1)."""

    total: jax.Array
    count: jax.Array | float | int
    weight: float = struct.field(pytree_node=False, default=1.0)

    def mean(self) -> jax.Array:
        count = jnp.asarray(self.count, jnp.float32)
        return self.total / jnp.where(count == 0, 1.0, count)


@struct.dataclass
class Out:
    """What an objective returns.

    terms: the loss is the sum of weight · total / count. metrics: logged means, without gradient.
    method_state: the objective's next state without gradient (queue, prototypes), as `init_method_state` shapes it.
    """

    terms: dict[str, Term]
    method_state: PyTree = ()
    metrics: dict[str, Term] = struct.field(default_factory=dict)

    def loss(self) -> jax.Array:
        """The scalar that is trained."""
        return sum((t.weight * t.mean() for t in self.terms.values()), jnp.float32(0))


def answer(objective: Any, ctx: Any) -> Out:
    """What the objective returns; raises UserError unless that is an `Out` whose numbers are scalars."""
    out, where = objective(ctx), f"objective {type(objective).__name__}"
    if not isinstance(out, Out):
        do = 'return Out({"name": Term(total, count)})'
        raise check.error(where, f"a {type(out).__name__}", "an Out", do)
    for name, term in (out.terms | out.metrics).items():
        if not isinstance(term, Term):
            do = f"write Term({name}.sum(), number of examples)"
            raise check.error(f"{where}: {name}", f"a {type(term).__name__}", "a Term", do)
        if jnp.shape(term.total) or jnp.shape(term.count):
            got = f"shapes {jnp.shape(term.total)} and {jnp.shape(term.count)}"
            do = "sum over the batch"
            raise check.error(f"{where}: {name}", got, "scalars for total and count", do)
    return out


@dataclasses.dataclass(frozen=True)
class Apply:
    """A model bound to parameters: `apply("image", x)`. Deterministic unless per-example `keys` are given."""

    model: Any  # flax module, hashable
    params: PyTree

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.model, method):
            got = f"a {type(self.model).__name__}, which has no {method!r}"
            raise check.error(
                "config.model", got, "a model that answers it", "change it or the objective"
            )
        return self.model.apply({"params": self.params}, *args, method=method, **kwargs)

    def jit(self, f: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """f(apply, *args, **static) compiled once for all values of the parameters; f a module-level function."""
        return functools.partial(_jitted(f, self.model, tuple(sorted(static.items()))), self.params)


@functools.lru_cache(maxsize=64)
def _jitted(
    f: Callable[..., Any], model: Any, static: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    return jax.jit(lambda params, *args: f(Apply(model, params), *args, **dict(static)))


@dataclasses.dataclass(frozen=True)
class Ctx:
    """What an objective sees of a step. Arrays are global: rows of all devices, or of one micro-batch inside `map`.

    batch: "image" u8[B R R 3], "text" i32[B L] (or [B K L]: `texts`), "mask" bool[B], "index" u32[B 2] (position in
    the sample stream, high and low word), "record" u32[B 2], and whatever else the data gives; leaves of a second
    stream of batches are prefixed by its name ("stream/image") and have their own size.
    """

    apply: Apply
    batch: Mapping[str, jax.Array]
    seed: jax.Array | None = None  # a PRNG key in training, None in evaluation
    step: jax.Array | int = 0
    method_state: PyTree = ()
    frozen: Mapping[str, Apply] = dataclasses.field(default_factory=dict)
    num_micro: int = 1
    micro_remat: str = "full"

    def student(self, method: str, *args: Any, draw: int = 0, **kwargs: Any) -> Any:
        """Calls the trained model: stochastic in training, deterministic in evaluation.

        draw: number of this pass, for methods that call a tower several times with other masks or dropout.
        """
        if method != "scale_bias" and "keys" not in kwargs:
            kwargs["keys"] = self.keys(f"{method}:{draw}")
        return self.apply(method, *args, **kwargs)

    def then(self, out: PyTree) -> tuple[Ctx, PyTree]:
        """This step and `out` again, such that what the step calls from here on is differentiated before `out` is.

        Towers that do not read each other have no order of their own, and a compiler may begin one's backward pass
        while the other's activations are all alive. Values and gradients stay what they were.
        """
        params, out = _before(self.apply.params, out)
        return dataclasses.replace(self, apply=dataclasses.replace(self.apply, params=params)), out

    def texts(self) -> list[jax.Array]:
        """The batch's captions, i32[B L] each: one, or K with `config.data.captions` "all"; pass k is their `draw`."""
        text = self.batch["text"]
        return [text] if text.ndim == 2 else [text[:, k] for k in range(text.shape[1])]

    @property
    def teachers(self) -> Mapping[str, Callable[..., Any]]:
        """Frozen models by name: same call as `student`, gradient stopped, deterministic unless given `keys`."""
        return _Teachers(self.frozen)

    def keys(self, stream: str) -> jax.Array | None:
        """One PRNG key per example = fold_in(seed, stream, sample index): no mesh, micro-batch or restart shows."""
        if self.seed is None:
            return None
        key = jax.random.fold_in(self.seed, zlib.crc32(stream.encode()))
        words_B2 = self.batch["index"]
        return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(key, w[0]), w[1]))(words_B2)

    def stream(self, name: str) -> Ctx:
        """The same step seen on the batch of another stream."""
        prefix = f"{name}/"
        leaves = {k.removeprefix(prefix): v for k, v in self.batch.items() if k.startswith(prefix)}
        if not leaves:
            streams = {k.split("/")[0] for k in self.batch if "/" in k}
            raise check.error(
                "objective",
                f"stream {name!r}",
                f"one of {sorted(streams)}",
                "add it to config.streams",
            )
        return dataclasses.replace(self, batch=leaves)

    def map(self, f: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
        """Runs f(ctx, *arrays) over the batch; every leaf that f returns leads with the batch axis.

        One call when there is one micro-batch. Otherwise a scan of calls over rows j::k, so that the batch keeps its
        sharding. With micro_remat "full" each call is computed again in the backward pass, and one micro-batch's
        activations live at a time. With "blocks" the inputs of all blocks are kept, of the whole batch: with blocks
        that are computed again in any case (the towers' remat "full"), only what a call works with is divided, and
        nothing is computed a third time. A loss taken over the result couples the whole batch exactly: this is
        cached-gradient accumulation (Gao et al. 2021, arXiv:2101.06983) with no code of its own. `arrays`, leading
        with the batch axis, are split alike.
        """
        if self.num_micro == 1:
            return f(self, *arrays)
        k = self.num_micro
        rows = {name: x for name, x in self.batch.items() if "/" not in name}

        def split(x: jax.Array) -> jax.Array:
            if x.shape[0] % k:
                raise check.error(
                    "batch", x.shape[0], f"a multiple of micro_batches = {k}", "change config.batch"
                )
            x = jnp.moveaxis(x.reshape(x.shape[0] // k, k, *x.shape[1:]), 1, 0)
            return mesh.constrain(x, None, "batch", *[None] * (x.ndim - 2))

        def join(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            return mesh.constrain(x, "batch", *[None] * (x.ndim - 1))

        def body(carry: tuple[()], xs: Any) -> tuple[tuple[()], PyTree]:
            batch, extra = xs
            return carry, f(dataclasses.replace(self, batch=batch, num_micro=1), *extra)

        body = jax.checkpoint(body, prevent_cse=False, policy=MICRO_REMAT[self.micro_remat])
        _, out = jax.lax.scan(body, (), jax.tree.map(split, (rows, arrays)))
        return jax.tree.map(join, out)


@jax.custom_vjp
def _before(first: PyTree, second: PyTree) -> tuple[PyTree, PyTree]:
    """Both as they are; second's cotangents wait for first's, of those leaves that have any."""
    return first, second


def _before_fwd(first: PyTree, second: PyTree) -> tuple[tuple[PyTree, PyTree], None]:
    primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    return jax.tree.map(lambda x: x.value, (first, second), is_leaf=primal), None


def _before_bwd(_: None, cotangents: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    none = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
    leaves, treedef = jax.tree.flatten(cotangents, is_leaf=none)
    waited = iter(jax.lax.optimization_barrier([x for x in leaves if not none(x)]))
    return jax.tree.unflatten(treedef, [None if none(x) else next(waited) for x in leaves])


_before.defvjp(_before_fwd, _before_bwd, symbolic_zeros=True)


class _Teachers(Mapping[str, Callable[..., Any]]):
    def __init__(self, frozen: Mapping[str, Apply]):
        self._frozen = frozen

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if not self._frozen:
            do = f"add config.teachers.{name}"
            raise check.error("config.teachers", "none", f"{name!r}, which the objective asks", do)
        if name not in self._frozen:
            raise check.unknown("config.teachers", name, self._frozen)
        apply = self._frozen[name]
        return lambda method, *args, **kwargs: jax.lax.stop_gradient(apply(method, *args, **kwargs))

    def __iter__(self) -> Iterator[str]:
        return iter(self._frozen)

    def __len__(self) -> int:
        return len(self._frozen)


@runtime_checkable
class Objective(Protocol):
    """A training method: a frozen dataclass of numbers.

    reads: batch leaves, checked against the data before compiling. It may also declare `needs`, what the model must
    answer ("decode", "image.embed"), and define `init_method_state(key)` → arrays (see `Out.method_state`).
    """

    reads: ClassVar[frozenset[str]]

    def __call__(self, ctx: Ctx) -> Out: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of an evaluation, and where it comes from (split, size, what it was computed on)."""

    metric: str
    value: float
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass; owns its data spec and `every_steps` (0: at the end of a stage only).

    needs: what the model must answer ("image.embed", "decode"), checked before training.
    """

    needs: ClassVar[frozenset[str]]
    split: str
    batch: int
    every_steps: int

    def __call__(self, apply: Apply, device_mesh: Any, io: Any) -> Iterator[Result]: ...
