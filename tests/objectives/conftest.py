"""What the tests of objectives share: a stage of training without its loop, on any mesh."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.everything import abstract
from vlp.core import mesh as meshes
from vlp.core.mesh import MeshShape
from vlp.core.types import Apply, Ctx
from vlp.optim import make as optimisers
from vlp.optim.schedules import Schedule
from vlp.train import state as states
from vlp.train.step import train_step

PX, LENGTH = 16, 8
# Compiles twice as fast; newer XLAs no longer know the option.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A model, an objective and parameters: their loss, gradients and steps, on a mesh of the first devices."""

    model: Any
    objective: Any
    params: Any
    teachers: Any = dataclasses.field(default_factory=dict)  # name → (model, decay, params)
    optim: optimisers.Optim = optimisers.Optim(weight_decay=0.0)
    lr: float = 1e-3
    px: int = PX
    length: int = LENGTH
    heads: Any = ()  # name and input width of the model's heads
    layout: Any = None  # shapes of the parameters with the names of their axes; None: of all that the model answers
    programs: Any = dataclasses.field(default_factory=dict, repr=False)
    quick: ClassVar[dict[str, bool]] = QUICK

    @property
    def boxed(self) -> Any:
        """Shapes of the parameters with the names of their axes."""
        if self.layout is not None:
            return self.layout
        return abstract(self.model, self.px, self.length, self.heads)

    def on(self, shape: tuple[int, int, int], batch: Any) -> tuple[Any, Any]:
        """The mesh, and the batch laid out on it."""
        mesh = meshes.make(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])
        return mesh, meshes.to_global(batch, mesh)

    def loss(
        self, params: Any, batch: Any, method_state: Any, frozen: Any, num_micro: int
    ) -> jax.Array:
        ctx = Ctx(
            Apply(self.model, params),
            batch,
            seed=jax.random.key(0),
            method_state=method_state,
            frozen={k: Apply(t[0], frozen[k]) for k, t in self.teachers.items()},
            num_micro=num_micro,
        )
        terms = self.objective(ctx).terms.values()
        return sum((term.weight * term.mean() for term in terms), jnp.float32(0))

    def value(
        self,
        batch: Any,
        shape: tuple[int, int, int] = (1, 1, 1),
        num_micro: int = 1,
        *,
        grads: bool = False,
    ) -> Any:
        """The loss (and gradients) of one step with masks and dropout on."""
        mesh, placed = self.on(shape, batch)
        frozen = {name: t[2] for name, t in self.teachers.items()}
        with jax.set_mesh(mesh):
            params = jax.device_put(self.params, meshes.shardings(self.boxed, mesh))
            run = self.compiled(num_micro, grads)
            return jax.device_get(run(params, placed, self.method_state(), frozen))

    def compiled(self, num_micro: int, grads: bool) -> Any:
        """`loss` under jit, the same function at each call (so that it compiles once for a mesh)."""
        if (num_micro, grads) not in self.programs:
            f = functools.partial(self.loss, num_micro=num_micro)
            f = jax.value_and_grad(f) if grads else f
            self.programs[num_micro, grads] = jax.jit(f, compiler_options=QUICK)
        return self.programs[num_micro, grads]

    def moved(self, grads: Any, lr: float) -> "Training":
        """After a step of plain gradient descent."""
        step = lambda p, g: np.asarray(p - lr * g, np.float32)
        return dataclasses.replace(self, params=jax.tree.map(step, self.params, grads))

    def method_state(self) -> Any:
        return nn.unbox(states.method_state(self.objective, self.model, jax.random.key(7)))

    def start(self, shape: tuple[int, int, int] = (1, 1, 1), num_micro: int = 1) -> Any:
        """The mesh, the first state in its layout, and the compiled step (state, batch) → state, metrics."""
        updater = optimisers.make(self.optim, self.params)
        create = functools.partial(
            states.create,
            updater=updater,
            teachers={name: t[2] for name, t in self.teachers.items()},
            method_state=self.method_state(),
            step=0,
        )
        mesh, _ = self.on(shape, {})
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(create, self.params)
            layout = states.shardings(self.boxed, updater, shapes, mesh)
            state = jax.device_put(create(self.params), layout)
        step = functools.partial(
            train_step,
            model=self.model,
            objective=self.objective,
            updater=updater,
            lr_at=Schedule(self.lr, "constant").at(8, 1),
            seed=0,
            num_micro=num_micro,
            teachers={name: t[:2] for name, t in self.teachers.items()},
        )
        out = (layout, meshes.replicated(mesh))
        return mesh, state, jax.jit(step, out_shardings=out, compiler_options=QUICK)

    def steps(
        self, batches: Any, shape: tuple[int, int, int] = (1, 1, 1), num_micro: int = 1
    ) -> tuple[list[states.State], list[dict[str, np.ndarray]]]:
        """States (the first is the start) and metrics of `train_step` on each batch, on the host."""
        mesh, state, step = self.start(shape, num_micro)
        out, metrics = [jax.device_get(state)], []
        with jax.set_mesh(mesh):
            for batch in batches:
                state, numbers = step(state, meshes.to_global(batch, mesh))
                out.append(jax.device_get(state))
                metrics.append(jax.device_get(numbers))
        return out, metrics


@pytest.fixture(scope="session")
def training():
    """The class `Training`."""
    return Training


@pytest.fixture(scope="session")
def make_batch():
    """The function (num=8, start=0, vocab=24, px=16) → a batch of random pairs at a place of the sample stream."""

    def make(num: int = 8, start: int = 0, vocab: int = 24, px: int = PX) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(start)
        ends = rng.integers(2, LENGTH, num)
        text = rng.integers(3, vocab, (num, LENGTH))
        text[:, 0] = 1
        place = np.arange(LENGTH)[None]
        text = np.where(place == ends[:, None], 2, np.where(place > ends[:, None], 0, text))
        index = np.stack([np.zeros(num), start + np.arange(num)], axis=1)
        return {
            "image": rng.integers(0, 256, (num, px, px, 3)).astype(np.uint8),
            "text": text.astype(np.int32),
            "index": index.astype(np.uint32),
        }

    return make
