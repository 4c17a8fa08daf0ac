"""Forms are each other's inverse, and no tensor is lost in silence."""

import numpy as np
import pytest

from vlp.core.check import UserError
from vlp.exchange import tensors as t

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (t.TRANSPOSED, [(4, 6)]),
        (t.FIRST_ROW, [(5, 3)]),
        (t.LAST_ROW, [(5, 3)]),
        (t.ONE, [(1,)]),
        (t.LEADING, [(1, 4, 3)]),
        (t.patches(2), [(6, 3, 2, 2)]),
        (t.heads_in(2, 3), [(24, 5)]),
        (t.heads_in(2, 3), [(24,)]),
        (t.heads_in(2, 1), [(8, 5)]),
        (t.heads_in(2, 3, tensors=3), [(8, 5)] * 3),
        (t.heads_in(2, 2, tensors=2), [(8,)] * 2),
        (t.q_and_kv(2), [(24, 5)]),
        (t.q_and_kv(2), [(24,)]),
        (t.heads_out(2), [(5, 8)]),
    ],
)
def test_forms_are_exact_both_ways(form, shapes):
    theirs = [RNG.normal(size=s) for s in shapes]
    again = form.write(*form.read(*theirs))
    assert len(again) == len(theirs)
    for a, b in zip(again, theirs):
        np.testing.assert_array_equal(a, b)


def test_heads_in_is_a_linear_map_by_heads():
    """q, k and v of x, as PyTorch's MultiheadAttention splits in_proj."""
    w, x = RNG.normal(size=(24, 5)), RNG.normal(size=(5,))
    (kernel,) = t.heads_in(2, 3).read(w)
    want = (w @ x).reshape(3, 2, 4)
    np.testing.assert_allclose(np.einsum("d,dphk->phk", x, kernel), want)


def test_a_convolution_is_a_map_of_flat_patches():
    w, patch = (
        RNG.normal(size=(6, 3, 2, 2)),
        RNG.normal(size=(2, 2, 3)),
    )  # a patch is (row, column, channel)
    (kernel,) = t.patches(2).read(w)
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, np.einsum("wcij,ijc->w", w, patch))


TABLE = [
    *t.stacked(t.linear("up", "fc"), "blocks/", "layers.{i}.", 2),
    *t.norm("norm", "ln"),
]  # fmt: skip
THEIRS = {
    **{f"layers.{i}.fc.weight": RNG.normal(size=(4, 3)) for i in range(2)},
    **{f"layers.{i}.fc.bias": RNG.normal(size=4) for i in range(2)},
    **{"ln.weight": RNG.normal(size=3), "ln.bias": RNG.normal(size=3)},
}


def test_layers_are_stacked_and_come_apart_again():
    ours = t.read(TABLE, THEIRS, "file")
    assert ours["blocks/up/kernel"].shape == (2, 3, 4)
    again = t.write(TABLE, ours, "model")
    assert again.keys() == THEIRS.keys()
    for name, x in THEIRS.items():
        np.testing.assert_array_equal(again[name], x)


def test_every_tensor_has_a_place_or_is_named():
    more = THEIRS | {"layers.2.fc.bias": np.zeros(4)}
    with pytest.raises(UserError, match=r"file: got 1 without a place \(layers.2.fc.bias\)"):
        t.read(TABLE, more, "file")
    less = {n: x for n, x in THEIRS.items() if not n.startswith("ln")}
    with pytest.raises(UserError, match=r"2 missing \(ln.bias, ln.weight\)"):
        t.read(TABLE, less, "file")
    with pytest.raises(UserError, match=r"model: got 4 missing"):
        t.write(TABLE, {}, "model")
    odd = THEIRS | {"layers.1.fc.weight": np.zeros((5, 3))}
    with pytest.raises(UserError, match="blocks/up/kernel"):
        t.read(TABLE, odd, "file")
