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
import numpy as np
from flax import errors, struct

from vlp.core import check, mesh, tree

PyTree = Any
Weight = float | tuple[tuple[float, float], ...]  # a number, or (progress, value) points: see `at`
KEPT = "block"  # checkpoint_name of the inputs of a tower's blocks and of the last block's output
MICRO_REMAT = {  # what the backward pass keeps of a micro-batch
    "full": jax.checkpoint_policies.nothing_saveable,
    "blocks": jax.checkpoint_policies.save_only_these_names(KEPT),
}
SHARE = (
    "stat_share"  # parameters of this name: the share of a pass that a call is (`ops.statistics`)
)
OF_CAPTIONS = ("text", "text.mask")  # leaves [B K …] where a record gives K captions


@struct.dataclass
class Term:
    """One term of a loss over the global batch: weight · total / count (count 0 counts as 1)."""

    total: jax.Array
    count: jax.Array | float | int
    weight: jax.Array | float = 1.0

    @classmethod
    def mean_of(
        cls, x: jax.Array, weight: jax.Array | float = 1.0, where: jax.Array | None = None
    ) -> Term:
        """The mean over all elements of `x`, or over those where `where` (bool, of x's shape) is True."""
        if where is None:
            return cls(x.sum(), x.size, weight)
        return cls(jnp.where(where, x, 0).sum(), where.sum(), weight)

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


def at(weight: Weight, progress: jax.Array | float) -> jax.Array | float:
    """The value of a schedule: the number itself, or the points joined by straight lines, constant beyond the ends.

    Args:
        weight: a number, or ((progress, value), …) with rising progress in [0, 1].
        progress: share of the stage that is done, in [0, 1].

    Raises:
        UserError: the points do not rise from 0 to 1 at most.
    """
    if isinstance(weight, int | float):
        return weight
    places = [place for place, _ in weight]
    if sorted(set(places)) != places or not all(0 <= place <= 1 for place in places):
        expected = "points ((progress, value), …) whose progress rises within [0, 1]"
        raise check.error("config.objective", weight, expected, "sort the points")
    values = jnp.asarray([value for _, value in weight], jnp.float32)
    return jnp.interp(jnp.asarray(progress, jnp.float32), jnp.asarray(places, jnp.float32), values)


class Named(dict):
    """A dict of arrays. A key that is missing is a UserError of one line, not a KeyError.

    where, do: of that line. made_by: what to do for some keys instead of `do`. used: the keys that were looked up.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str = "",
        do: str = "",
        made_by: Mapping[str, str] | None = None,
    ):
        super().__init__(values)
        self.where, self.do, self.made_by = where, do, dict(made_by or {})
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)

    def __missing__(self, name: str) -> Any:
        do = self.made_by.get(name) or check.did_you_mean(str(name), self, self.do)
        raise check.error(self.where, f"no {name!r}", f"one of {sorted(self)}", do)


def _like(named: Any, values: Mapping[str, Any]) -> Named:
    """Returns other values with the same messages; `used` is shared."""
    out = Named(values, named.where, named.do, named.made_by)
    out.used = named.used
    return out


jax.tree_util.register_pytree_with_keys(
    Named,
    lambda x: (
        [(jax.tree_util.DictKey(k), dict.__getitem__(x, k)) for k in sorted(x)],
        (tuple(sorted(x)), x.where, x.do, tuple(x.made_by.items())),
    ),
    lambda aux, leaves: Named(dict(zip(aux[0], leaves)), aux[1], aux[2], dict(aux[3])),
)


def answer(objective: Any, ctx: Any) -> Out:
    """What the objective returns; raises UserError unless that is an `Out` whose numbers are scalars."""
    out, where = objective(ctx), f"objective {type(objective).__name__}"
    if not isinstance(out, Out):
        do = 'return Out({"name": Term(total, count)})'
        raise check.error(where, f"a {type(out).__name__}", "an Out", do)
    if not out.terms:
        do = 'return Out({"name": Term.mean_of(loss_B)})'
        raise check.error(where, "an Out without terms", "one term or more, to minimise", do)
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
    """A model with parameters: `apply("image", x)`. Deterministic unless per-example `keys` are given.

    stop: no gradient flows into parameters or inputs (a teacher). bound: the model is bound already, and makes the
    parameters that a call asks for (`train.state.init_params`); `params` is then empty.
    """

    model: Any  # flax module, hashable
    params: PyTree
    stop: bool = False
    bound: bool = False

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the model's method returns; a dict's missing keys are UserErrors.

        Raises UserError for a method that the model lacks, and for parameters that were never made.
        """
        kind = type(self.model).__name__
        if not hasattr(self.model, method):
            got = f"a {kind} without a method {method!r}"
            own = [k for k, f in vars(type(self.model)).items() if k[0] != "_" and callable(f)]
            do = check.did_you_mean(method, set(own) - {"setup"}, "use a model that has it")
            raise check.error("config.model", got, f"a model with {method!r}", do)
        if self.bound:
            out = getattr(self.model, method)(*args, **kwargs)
        else:
            out = self._run(kind, method, *args, **kwargs)
        out = jax.lax.stop_gradient(out) if self.stop else out
        if type(out) is not dict:
            return out
        made_by = getattr(self.model, "MADE_BY", {})
        do = "set the model's fields that make it, or use a model that gives it"
        return Named(out, f"config.model: {kind}.{method}", do, made_by)

    def _run(self, kind: str, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.model.apply({"params": self.params}, *args, method=method, **kwargs)
        except errors.ScopeParamNotFoundError as e:
            got = f"no parameters for {kind}.{method} ({str(e).split(' (http')[0]})"
            do = "train it with an objective that uses them"
            raise check.error("config.model", got, "parameters that training made", do) from None

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

    batch: the leaves that the objective `reads`: "image" u8[B R R 3], "text" i32[B L] (or [B K L]: `captions`) …, and
    always "mask" bool[B], "index" u32[B 2] (position in the sample stream, high and low word) and "record" u32[B 2].
    Leaves of another stream are prefixed by its name ("more/image") and have their own batch size.
    progress: share of the stage that is done, in [0, 1]. frozen: the teachers. num_captions: inside `captions`, how
    many rows each example has.
    """

    apply: Apply
    batch: Mapping[str, jax.Array]
    seed: jax.Array | None = None  # a PRNG key in training, None in evaluation
    step: jax.Array | int = 0
    method_state: PyTree = ()
    frozen: Mapping[str, Apply] = dataclasses.field(default_factory=dict)
    num_micro: int = 1
    micro_remat: str = "full"
    progress: jax.Array | float = 0.0
    num_captions: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.batch, Named):
            do = "name it in the objective's `reads`, and let config.data give it"
            object.__setattr__(self, "batch", Named(self.batch, "objective: batch", do))

    def student(self, method: str, *args: Any, pass_id: int = 0, **kwargs: Any) -> Any:
        """Calls the trained model: stochastic in training, deterministic in evaluation and in teachers.

        pass_id: number of this pass, for methods that call a tower several times with other masks or dropout.
        """
        if method != "scale_bias" and "keys" not in kwargs:
            passes = range(pass_id, pass_id + self.num_captions)
            kwargs["keys"] = self._keys([f"{method}:{k}" for k in passes])
        return self.apply(method, *args, **kwargs)

    def head(self, name: str, *x: Any, pass_id: int = 0, **kwargs: Any) -> Any:
        """Calls one of the objective's heads on arrays that lead with the batch axis."""
        passes = range(pass_id, pass_id + self.num_captions)
        kwargs.setdefault("keys", self._keys([f"head.{name}:{k}" for k in passes]))
        return self.apply("head", name, *x, **kwargs)

    def teacher(self, name: str) -> Ctx:
        """The same step seen through a teacher's parameters: deterministic, no gradient. Raises UserError if none."""
        if not self.frozen:
            do = f"add config.teachers.{name}"
            raise check.error("config.teachers", "none", f"{name!r}, which the objective asks", do)
        if name not in self.frozen:
            raise check.unknown("config.teachers", name, self.frozen)
        apply = dataclasses.replace(self.frozen[name], stop=True)
        return dataclasses.replace(self, apply=apply, seed=None)

    def keys(self, stream: str) -> jax.Array | None:
        """One PRNG key per row = fold_in(seed, stream, sample index): no mesh, micro-batch or restart shows.

        Inside `captions`, each caption of an example has its own key. None in evaluation and in teachers.
        """
        more = [f"{stream}:{k}" for k in range(1, self.num_captions)]
        return self._keys([stream, *more])

    def _keys(self, streams: list[str]) -> jax.Array | None:
        """One key per row; with K streams, row b·K + k has its key from stream k."""
        if self.seed is None:
            return None
        words_B2 = self.batch["index"]
        fold = jax.random.fold_in
        if len(streams) == 1:
            key = fold(self.seed, zlib.crc32(streams[0].encode()))
            return jax.vmap(lambda w: fold(fold(key, w[0]), w[1]))(words_B2)
        numbers_K = np.array([zlib.crc32(stream.encode()) for stream in streams], np.uint32)
        seed = self.seed
        keys_K = jax.vmap(lambda n: fold(seed, n))(numbers_K)
        keys_B = jnp.tile(keys_K, words_B2.shape[0] // len(streams))
        return jax.vmap(lambda key, w: fold(fold(key, w[0]), w[1]))(keys_B, words_B2)

    def at(self, weight: Weight) -> jax.Array | float:
        """The value of a weight at this point of the stage (`types.at`)."""
        return at(weight, self.progress)

    def stream(self, name: str) -> Ctx:
        """The same step seen on the batch of another stream."""
        prefix = f"{name}/"
        leaves = {k.removeprefix(prefix): v for k, v in self.batch.items() if k.startswith(prefix)}
        if not leaves:
            streams = sorted({k.split("/")[0] for k in self.batch if "/" in k})
            do = f"add config.streams.{name}, and its leaves to the objective's `reads`"
            raise check.error("objective", f"stream {name!r}", f"one of {streams}", do)
        return dataclasses.replace(self, batch=leaves)

    def captions(self, f: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
        """Runs f(ctx, *arrays) once for all captions of the batch: row b·K + k is caption k of example b.

        The program that is traced does not grow with K. Dropout and masks differ between captions.

        Args:
            f: gets "text" i32[B·K L] (and "text.mask"), with every other leaf and `arrays` repeated K times. Every
                leaf that it returns has leading axis B·K.
            arrays: pytrees with leading axis B.

        Returns:
            What f returns, [B K …]. K is 1 where the batch has one text for each example.
        """
        rows = {name: x for name, x in self.batch.items() if "/" not in name}
        if self.batch["text"].ndim == 2:
            out = f(dataclasses.replace(self, batch=_like(self.batch, rows)), *arrays)
            check_rows("ctx.captions: what f returns", out, self.batch["text"].shape[0])
            return jax.tree.map(lambda x: x[:, None], out)
        num, k = self.batch["text"].shape[:2]

        def pin(x: jax.Array) -> jax.Array:
            return mesh.constrain(x, "batch", *[None] * (x.ndim - 1))

        def join(x: jax.Array) -> jax.Array:
            return pin(x.reshape(num * k, *x.shape[2:]))

        def repeat(x: jax.Array) -> jax.Array:
            return join(jnp.broadcast_to(x[:, None], (num, k, *x.shape[1:])))

        batch = {name: (join if name in OF_CAPTIONS else repeat)(x) for name, x in rows.items()}
        ctx = dataclasses.replace(self, batch=_like(self.batch, batch), num_captions=k)
        out = f(ctx, *jax.tree.map(repeat, arrays))
        check_rows("ctx.captions: what f returns", out, num * k)
        return jax.tree.map(lambda x: pin(x.reshape(num, k, *x.shape[1:])), out)

    def map(self, f: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
        """Runs f(ctx, *arrays) over the batch, micro-batch by micro-batch.

        One call when there is one micro-batch. Otherwise a scan of calls over rows j::k, so that the batch keeps its
        sharding. With micro_remat "full" each call is computed again in the backward pass, and one micro-batch's
        activations live at a time. With "blocks" the inputs of all blocks are kept, of the whole batch: use it where
        the towers' remat is "full", so that nothing is computed a third time. A loss taken over the result couples the
        whole batch exactly: this is cached-gradient accumulation (Gao et al. 2021, arXiv:2101.06983).

        Args:
            f: every leaf that it returns leads with the batch axis.
            arrays: trees of arrays that lead with the batch axis; they are split as the batch is.

        Returns:
            What f returns, for the whole batch, in the batch's order.

        Raises:
            UserError: the micro-batches do not divide the batch.
        """
        rows = {name: x for name, x in self.batch.items() if "/" not in name}
        num = next(iter(rows.values())).shape[0]
        check_rows("ctx.map: an array given", arrays, num)
        if self.num_micro == 1:
            return check_rows("ctx.map: what f returns", f(self, *arrays), num)
        k = self.num_micro

        def split(x: jax.Array) -> jax.Array:
            if x.shape[0] % k:
                expected = f"a multiple of micro_batches = {k}"
                do = f"set config.batch to a multiple of {k}"
                raise check.error("batch", x.shape[0], expected, do)
            x = jnp.moveaxis(x.reshape(x.shape[0] // k, k, *x.shape[1:]), 1, 0)
            return mesh.constrain(x, None, "batch", *[None] * (x.ndim - 2))

        def join(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            return mesh.constrain(x, "batch", *[None] * (x.ndim - 1))

        share = lambda name, x: x / k if name.endswith(SHARE) else x
        params = tree.map_named(share, self.apply.params)
        apply = dataclasses.replace(self.apply, params=params)

        def body(carry: tuple[()], xs: Any) -> tuple[tuple[()], PyTree]:
            batch, extra = xs
            out = f(dataclasses.replace(self, apply=apply, batch=batch, num_micro=1), *extra)
            return carry, check_rows("ctx.map: what f returns", out, num // k)

        body = jax.checkpoint(body, prevent_cse=False, policy=MICRO_REMAT[self.micro_remat])
        _, out = jax.lax.scan(body, (), jax.tree.map(split, (rows, arrays)))
        return jax.tree.map(join, out)


def check_rows(where: str, tree: PyTree, num: int) -> PyTree:
    """Returns the tree. Raises: UserError for a leaf that does not lead with `num` rows."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(x)[:1] != (num,):
            name = jax.tree_util.keystr(path)
            do = "reduce over the batch outside of it, and return one row per example"
            raise check.error(f"{where}{name}", f"shape {jnp.shape(x)}", f"[{num} …]", do)
    return tree


@runtime_checkable
class Objective(Protocol):
    """A training method: a frozen dataclass of numbers.

    reads: names of the batch's leaves that it uses; others are not made. It may also declare `heads`, frozen specs by
    name (`models.heads.HEADS`), and define `init_method_state(key, model)` → arrays (see `Out.method_state`).
    Large ones are made by `mesh.logical`, with the names of their axes; others are whole on every device.

    Hook between steps: `refresh_every`, a number of samples, and `refresh(state, embed)` → method state, called on the
    host before the first step at or after each multiple of it (`train.refresh`: clusterings, prototypes).
    mask_id, vocab_size: fields that are None are filled in from the tokenizer (`ops.masking.mask_words`).
    """

    reads: ClassVar[frozenset[str]]

    def __call__(self, ctx: Ctx) -> Out: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of an evaluation and its provenance (split, size, software)."""

    metric: str
    value: float
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass; owns its data spec and `every_steps` (0: at the end of a stage only).

    It may define `asks(apply, image, text)`: what it asks of the model for one batch. That is traced before training,
    so that what the model lacks is an error of one line then.
    """

    split: str
    batch: int
    every_steps: int

    def __call__(self, apply: Apply, device_mesh: Any, io: Any) -> Iterator[Result]: ...
