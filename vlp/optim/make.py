"""The optimiser: an optax update rule, and ordered rules by parameter name (freeze, learning rate, weight decay).

A rule is a full-match pattern of leaf names. The first that matches a leaf decides. Every leaf must have a rule, and
every rule a leaf: otherwise a mistyped pattern would have no effect and no error.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlp.core import check, tree
from vlp.ops import statistics

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose names match.

    match: pattern of leaf names (fullmatch).
    lr, decay: multipliers of the learning rate and of the weight decay.
    freeze: no update and no optimiser state.
    clamp: (low, high), to which the parameter is clipped after each update.
    layer_decay: for leaves of stacked blocks; block k of n has layer_decay^(n − k) of the rate, k from 0 (Clark et al.
        2020, arXiv:2003.10555). In MAE's fine-tuning the leaves below the blocks have layer_decay^(n + 1): give that
        as `lr`.
    """

    match: str
    lr: float = 1.0
    decay: float = 1.0
    freeze: bool = False
    clamp: tuple[float, float] | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check.pattern("config.optim.rules: match", self.match)
        low, high = self.clamp or (0, 1)
        bounds = {
            "lr": (0 <= self.lr < math.inf, "at least 0"),
            "decay": (0 <= self.decay < math.inf, "at least 0"),
            "clamp": (low < high, "(low, high)"),
            "layer_decay": (0 < self.layer_decay <= 1, "in (0, 1]"),
        }
        check.bounds("config.optim.rules", self, bounds)


DEFAULT_RULES = (
    Rule(".*logit_scale", decay=0.0, clamp=(0.0, math.log(100.0))),
    Rule(".*(bias|norm.*/scale|/pos|/cls|/cls_pos|/registers|/query|logit_bias)", decay=0.0),
    Rule(".*"),
)


STATISTIC = Rule(
    ".*/stat_.*", freeze=True
)  # of a layer's statistics, which the forward pass changes


B2 = {"adamw": 0.95, "adafactor": 0.999, "lion": 0.99}  # CLIP's followers; CoCa and ViT-G; Lion


@dataclasses.dataclass(frozen=True)
class Optim:
    """p ← p − lr · (u + weight_decay · p): the decay is decoupled, and u is the direction by `name`.

    "adamw" (Loshchilov & Hutter 2019, arXiv:1711.05101): m̂/(√v̂ + eps). "adafactor" (Shazeer & Stern 2018,
    arXiv:1804.04235) as in Zhai et al. 2022 (arXiv:2106.04560, §3.4) and CoCa: v is factored if two dimensions reach
    32, β2 rises as 1 − t^−0.8 up to b2, g/√v is clipped to RMS 1 per leaf (Shazeer & Stern's d, which the released code
    of Zhai et al. omits) and then averaged by b1 without bias correction. Step sizes are not relative, and each block
    of a stack counts as a leaf.
    "lion" (Chen et al. 2023, arXiv:2302.06675): sign(b1 · m + (1 − b1) · g). It needs an lr 3–10 times smaller than
    AdamW's, and a weight_decay larger by the same factor.

    b2: None: as in the papers (B2).
    eps: of AdamW only.
    clip_norm: bound of the gradient's global norm; None: unbounded.
    mu_dtype: type of the first moment, which "bfloat16" halves; None: that of the parameters.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.2
    clip_norm: float | None = 1.0
    mu_dtype: str | None = None
    rules: tuple[Rule, ...] = DEFAULT_RULES

    def __post_init__(self) -> None:
        if self.name not in B2:
            raise check.unknown("config.optim.name", self.name, B2)
        clip = self.clip_norm
        bounds = {
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (self.b2 is None or 0 <= self.b2 < 1, "in [0, 1), or None"),
            "eps": (self.eps > 0, "above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip_norm": (clip is None or clip > 0, "above 0, or None"),
            "mu_dtype": (
                self.mu_dtype in (None, "float32", "bfloat16"),
                "'float32', 'bfloat16' or None",
            ),
        }
        check.bounds("config.optim", self, bounds)


def direction(o: Optim) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction of `o.name`, not yet scaled by −lr."""
    b2 = B2[o.name] if o.b2 is None else o.b2
    if o.name == "adamw":
        return optax.scale_by_adam(o.b1, b2, o.eps, mu_dtype=o.mu_dtype)
    if o.name == "lion":
        return optax.scale_by_lion(o.b1, b2, mu_dtype=o.mu_dtype)

    def decay_rate(step: Any, power: Any) -> jax.Array:
        return jnp.minimum(b2, 1.0 - (step + 1.0) ** -power)

    return optax.chain(
        _by_layer(optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay_rate)),
        optax.stateless(_clipped),
        optax.ema(o.b1, debias=False, accumulator_dtype=o.mu_dtype),
    )


def stacked(name: str) -> bool:
    """Returns whether a leaf holds the parameters of several blocks, stacked on its first axis."""
    return "/blocks/" in f"/{name}"


def _by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` (factored RMS) to each layer of a stack: the layer axis must not be factored."""

    def every(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(f) if stacked(name) else f

    def gather(leaves: PyTree, count: Any) -> optax.FactoredState:
        pick = lambda i: jax.tree.map(lambda x: x[i], leaves, is_leaf=lambda x: type(x) is tuple)
        return optax.FactoredState(count, pick(0), pick(1), pick(2))

    def init(params: PyTree) -> optax.FactoredState:
        def one(p: Any) -> tuple[Any, ...]:
            state: Any = inner.init(p)
            return state.v_row, state.v_col, state.v

        leaves = tree.map_named(lambda name, p: every(name, one)(p), params)
        return gather(leaves, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, optax.FactoredState]:
        def one(g: Any, *moments: Any) -> tuple[Any, ...]:
            found: Any = inner.update(g, optax.FactoredState(state.count, *moments), g)
            u, new = found
            return new.v_row, new.v_col, new.v, u

        moments = (state.v_row, state.v_col, state.v)
        leaves = tree.map_named(lambda name, *x: every(name, one)(*x), updates, *moments)
        updates = jax.tree.map(lambda x: x[3], leaves, is_leaf=lambda x: type(x) is tuple)
        return updates, gather(leaves, optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _clipped(updates: PyTree, params: PyTree | None = None) -> PyTree:
    """Divides each leaf, or each block of a stack, by its root mean square if that is over 1."""

    def one(name: str, u: jax.Array) -> jax.Array:
        axes = tuple(range(int(stacked(name)), u.ndim))
        return u / jnp.maximum(1.0, jnp.sqrt(jnp.square(u).mean(axes, keepdims=True)))

    return tree.map_named(one, updates)


def assign(rules: Sequence[Rule], params: PyTree) -> PyTree:
    """Returns a tree like `params` with the rule of each leaf.

    Raises:
        UserError: a leaf has no rule, or a rule (other than a default one) no leaf, or no leaf is trained.
    """
    used: set[int] = set()

    def pick(name: str, _: Any) -> Rule:
        for i, rule in enumerate(rules):
            if re.fullmatch(rule.match, name):
                used.add(i)
                if rule.layer_decay != 1 and not stacked(name):
                    expected = "leaves of stacked blocks under a rule with layer_decay"
                    do = "match '.*/blocks/.*', and give the others an lr"
                    raise check.error("config.optim.rules", name, expected, do)
                return STATISTIC if statistics.is_slot(name) and not rule.freeze else rule
        raise check.error(
            "config.optim.rules",
            f"no rule for {name!r}",
            "a rule for every parameter",
            "add a last rule that matches '.*'",
        )

    out = tree.map_named(pick, params)
    if all(rule.freeze for rule in jax.tree.leaves(out)):
        expected, do = "a parameter that is trained", "remove freeze from a rule"
        raise check.error("config.optim.rules", "every parameter frozen", expected, do)
    # The default rules may match nothing: not every model has every kind of leaf.
    defaults = {rule.match for rule in DEFAULT_RULES}
    idle = [
        r.match
        for i, r in enumerate(rules)
        if i not in used and r.match not in defaults and r.match != ".*"
    ]
    if idle:
        names = list(tree.named(params))
        near = check.unknown("config.optim.rules", idle[0], names)
        raise check.UserError(
            f"{near} (the pattern matches no parameter that an earlier rule leaves)"
        )
    return out


def table(rules: Sequence[Rule], params: PyTree) -> str:
    """Returns one line per rule: how many leaves and parameters it covers, and what it does to them."""
    assigned = tree.named(assign(rules, params))
    leaves = tree.named(params)
    lines = [f"{'rule':44s} {'leaves':>6s} {'parameters':>14s}  effect"]
    has_statistics = STATISTIC in assigned.values()
    for rule in (*rules, *[STATISTIC] * has_statistics):
        mine = [leaves[n] for n, r in assigned.items() if r is rule]
        effect = "frozen" if rule.freeze else f"lr ×{rule.lr:g}, decay ×{rule.decay:g}"
        if rule.layer_decay != 1:
            effect += f", ×{rule.layer_decay:g} per block below"
        if rule is STATISTIC:
            effect = "running statistics, not trained"
        if rule.clamp:
            effect += f", clamped to [{rule.clamp[0]:g}, {rule.clamp[1]:.4g}]"
        lines.append(f"{rule.match:44s} {len(mine):6d} {tree.size(mine):14,d}  {effect}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Updater:
    """The optimiser bound to the leaves of a model. Frozen leaves are not part of its state."""

    optim: Optim
    rules: Any  # tree of Rule, like the parameters

    @property
    def trainable(self) -> PyTree:
        return jax.tree.map(lambda r: not r.freeze, self.rules)

    @property
    def statistics(self) -> PyTree:
        """Returns which leaves are statistics that the forward pass updates; frozen ones are not updated."""
        return jax.tree.map(lambda r: r is STATISTIC, self.rules)

    @property
    def transform(self) -> optax.GradientTransformation:
        return optax.chain(self._clip, direction(self.optim))

    def init(self, params: PyTree) -> PyTree:
        return self.transform.init(tree.where(self.trainable, params))

    def update(
        self, grads: PyTree, opt: PyTree, params: PyTree, lr: jax.Array
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """Returns the next trainable parameters, the next state, and the norm of the change, after clamping.

        Args:
            grads, params: of the trainable leaves only.
            opt: the optimiser's state.
            lr: learning rate of this step, f32[].
        """
        new, opt, changes = self.apply(self.clipped(grads), opt, params, lr)
        return new, opt, tree.norm(changes)

    @property
    def _clip(self) -> optax.GradientTransformation:
        o = self.optim
        return optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()

    def clipped(self, grads: PyTree) -> PyTree:
        """The first half of `update`: the gradients, their global norm bounded."""
        return self._clip.update(grads, self._clip.init(grads))[0]

    def apply(
        self, grads: PyTree, opt: PyTree, params: PyTree, lr: jax.Array
    ) -> tuple[PyTree, PyTree, PyTree]:
        """The second half of `update`: of clipped gradients. Returns the changes instead of their norm."""
        directions, inner = direction(self.optim).update(grads, opt[1], params)
        opt = (opt[0], inner)
        rules = tree.where(self.trainable, self.rules)

        def change(rule: Rule, u: jax.Array, p: jax.Array) -> jax.Array:
            rate = -lr * rule.lr
            if rule.layer_decay != 1:
                num = p.shape[0]
                powers = jnp.arange(num, 0, -1).reshape(num, *[1] * (p.ndim - 1))
                rate = rate * jnp.broadcast_to(rule.layer_decay**powers, p.shape)
            return rate * (u + self.optim.weight_decay * rule.decay * p)

        def clamp(rule: Rule, p: jax.Array) -> jax.Array:
            return jnp.clip(p, *rule.clamp) if rule.clamp else p

        def applied(rule: Rule, u: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
            return q - p if rule.clamp else u

        changes = jax.tree.map(change, rules, directions, params)
        new = jax.tree.map(clamp, rules, optax.apply_updates(params, changes))
        return new, opt, jax.tree.map(applied, rules, changes, params, new)


def make(optim: Optim, params: PyTree) -> Updater:
    """Binds the optimiser to parameters or their shapes. Raises UserError for rules that do not fit them."""
    return Updater(optim, assign(optim.rules, params))
