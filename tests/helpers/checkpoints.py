"""Small checkpoints: two trees of sharded arrays whose values depend on the step."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp.core import mesh as meshes

MESH = meshes.MeshShape(2, 2, 2)


def trees(step):
    """Parameters and the rest of a state, with values that depend on the step, sharded over eight devices."""
    mesh = meshes.make(MESH)
    put = lambda x, *names: jax.device_put(
        np.float32(x), jax.sharding.NamedSharding(mesh, meshes.spec(names, np.shape(x), mesh))
    )
    params = {"w": put(np.arange(32).reshape(8, 4) + 100 * step, "embed", "mlp")}
    average = {"w": put(np.arange(32).reshape(8, 4) - 100 * step, "embed", "mlp")}
    rest = {
        "step": jnp.int32(step),
        "teachers": {"ema": average},
        "method_state": (),
        "opt": [None, put(np.ones(64), None)],
    }
    return params, rest


def save(checkpoints, *steps):
    for step in steps:
        params, rest = trees(step)
        checkpoints.save(step, params, rest, {"position": {"step": step}, "note": "é"})
    checkpoints.wait()
