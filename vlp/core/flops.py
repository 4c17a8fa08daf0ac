"""FLOPs of a traced function: matrix products and convolutions, on all devices together.

Counted on the jaxpr: nothing is compiled, and every model and method is covered. A loop's body counts once per
iteration, and rematerialised work as often as it is computed. Elementwise work is not counted (below 3 % of a
transformer's step).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def of(f: Callable[..., Any], *args: Any) -> int:
    """Returns the FLOPs of f(*args), two per multiply-add; args may be abstract."""
    return of_jaxpr(jax.make_jaxpr(f)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
            continue
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_features
            continue
        if name == "cond":
            total += max(of_jaxpr(branch.jaxpr) for branch in params["branches"])
            continue
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "shard_map":  # the body is one device's share
            manual = params.get("manual_axes") or params["mesh"].axis_names
            times = math.prod(params["mesh"].shape[a] for a in manual)
        elif name == "pallas_call":  # the body is one grid step
            times = math.prod(params["grid_mapping"].grid)
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * of_jaxpr(inner)
    return total
