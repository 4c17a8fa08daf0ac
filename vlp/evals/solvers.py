"""Classifiers on frozen features: ridge regression in closed form, logistic regression, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

BIAS = 100.0  # the constant feature of big_vision's fewshot_lsr.py: so large that the bias is hardly penalised
_ROWS = 2**10  # test rows whose neighbours are searched at a time


def ridge(
    x_ND: Float[np.ndarray, "N D"],
    y_N: Int[np.ndarray, "N"],
    test_MD: Float[np.ndarray, "M D"],
    num_classes: int,
    l2: float,
) -> Int[np.ndarray, "M"]:
    """Classes by regression on targets −1 and 1, as in big_vision's few-shot protocol (fewshot_lsr.py).

    Features are standardised with the training rows' mean and deviation + 1e-5; then W = (XᵀX + l2·I)⁻¹ XᵀY, or its
    dual where there are fewer rows than features. Computed in float64.
    """
    mean, std = x_ND.mean(0, dtype=np.float64), x_ND.std(0, dtype=np.float64) + 1e-5
    x, test = (
        (np.pad((z - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)) for z in (x_ND, test_MD)
    )
    y = 2.0 * (y_N[:, None] == np.arange(num_classes)) - 1
    if len(x) >= x.shape[1]:
        weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), y)
    return (test @ weights).argmax(axis=1)


def logistic(
    x_ND: Float[np.ndarray, "N D"], y_N: Int[np.ndarray, "N"], num_classes: int, l2: float
) -> tuple[Float[np.ndarray, "D C"], Float[np.ndarray, "C"]]:
    """Weights and biases that minimise mean cross-entropy + l2 / 2 · Σ weights², by L-BFGS; biases are free.

    The rows lie on the devices as they come (`jax.Array`s stay sharded); the optimiser runs on the host.
    """
    dim = x_ND.shape[1]
    x, y = jnp.asarray(x_ND, jnp.float32), jnp.asarray(y_N)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _loss_grad(jnp.asarray(flat, jnp.float32), x, y, num_classes)
        weights = flat[: dim * num_classes]
        grad = np.asarray(grad, np.float64)
        grad[: dim * num_classes] += l2 * weights
        return float(value) + l2 / 2 * float(weights @ weights), grad

    start = np.zeros((dim + 1) * num_classes)
    options = {"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-6}
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return found[: dim * num_classes].reshape(dim, num_classes), found[dim * num_classes :]


def _cross_entropy(flat: jax.Array, x: jax.Array, y: jax.Array, num_classes: int) -> jax.Array:
    weights, bias = jnp.split(flat, [x.shape[1] * num_classes])
    logits_NC = jnp.dot(x, weights.reshape(-1, num_classes), precision="highest") + bias[None]
    right_N = jnp.take_along_axis(logits_NC, y[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits_NC, axis=1) - right_N).mean()


_loss_grad = jax.jit(jax.value_and_grad(_cross_entropy), static_argnums=3)


def probe(
    x_ND: Float[np.ndarray, "N D"],
    y_N: Int[np.ndarray, "N"],
    test_MD: Float[np.ndarray, "M D"],
    num_classes: int,
    l2s: Sequence[float],
) -> tuple[Int[np.ndarray, "M"], float]:
    """Classes by logistic regression, and the l2 used: the best on a held-out fifth of the training rows.

    Of equal ones the largest. The classifier is then fitted to all rows. Features are standardised first.
    """
    mean, std = x_ND.mean(0, dtype=np.float64), x_ND.std(0, dtype=np.float64) + 1e-5
    x, test = (((z - mean) / std).astype(np.float32) for z in (x_ND, test_MD))
    best = max(l2s)
    if len(l2s) > 1:
        order = np.random.default_rng(0).permutation(len(x))
        held, kept = order[: len(x) // 5], order[len(x) // 5 :]
        right = {}
        for l2 in sorted(l2s, reverse=True):
            weights, bias = logistic(x[kept], y_N[kept], num_classes, l2)
            right[l2] = int(((x[held] @ weights + bias).argmax(axis=1) == y_N[held]).sum())
        best = max(right, key=lambda l2: (right[l2], l2))
    weights, bias = logistic(x, y_N, num_classes, best)
    return (test @ weights + bias).argmax(axis=1), best


def neighbours(
    x_ND: Float[np.ndarray, "N D"],
    y_N: Int[np.ndarray, "N"],
    test_MD: Float[np.ndarray, "M D"],
    num_classes: int,
    k: int,
    temperature: float,
) -> Int[np.ndarray, "M"]:
    """Classes by a vote of the k nearest rows by cosine, each with weight exp(cosine / temperature) (Wu et al. 2018,
    arXiv:1805.01978, §3.4). Rows are unit vectors; of equally near ones the first count."""
    out = []
    for start in range(0, len(test_MD), _ROWS):
        cosine = test_MD[start : start + _ROWS].astype(np.float64) @ x_ND.T.astype(np.float64)
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        weight = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / temperature)
        votes = np.zeros((len(cosine), num_classes))
        np.add.at(votes, (np.arange(len(cosine))[:, None], y_N[nearest]), weight)
        out.append(votes.argmax(axis=1))
    return np.concatenate(out)
