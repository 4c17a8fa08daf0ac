"""`vlp plan` with a target: the compiler's verdict, the estimate, FLOPs, and what would fit."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from helpers import runs
from vlp.core import config as configs
from vlp.core import flops
from vlp.models.interface import with_fields
from vlp.ops.attention import attend
from vlp.plan import compiled, estimate, hlo, memory_search
from vlp.train import metrics
from vlp.train.stages import parse

SMOKE = f"{runs.ROOT / 'configs' / 'coca.py'}:smoke"
CPU = lambda: compiled.Target("8 CPU devices", jax.devices())


def prepared(spec=SMOKE, *overrides, target=None):
    settings, stages = parse(configs.load(spec, overrides))
    return compiled.prepare(stages[0], settings, target or CPU())


def test_bytes_of_the_state_are_exact():
    parts, _ = prepared(SMOKE, "optim.name=adamw")
    found = compiled.state_bytes(parts)
    sizes = [x.size * 4 for x in jax.tree.leaves(parts.abstract.params)]
    assert sum(sizes) / 8 <= found["param_bytes"] < sum(sizes)
    assert found["batch_bytes"] == (16 * 16 * 3 + 12 * 4 + 1 + 8 + 8) * 1  # 8 rows, one a device
    assert found["opt_bytes"] > 1.9 * found["param_bytes"]  # Adam's two moments


def unrolled_flops(parts):
    """The compiler's count of the step, layers unrolled, as lowered."""
    model = with_fields(parts.stage.model, scan=False, remat="none")
    grad = jax.grad(lambda p, b: metrics.loss(parts.stage, model, p, b, 1))
    bare = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t)
    lowered = jax.jit(grad).lower(bare(parts.abstract.params), bare(dict(parts.batch)))
    return lowered.cost_analysis()["flops"] / parts.stage.batch


@pytest.mark.parametrize(
    "spec",
    [
        "coca.py:size=base",
        "coca.py:size=large",
        "clip.py:size=B/32",
        "siglip.py:size=B/16",
        "flip.py:size=L/16",
    ],
)
def test_flops_are_the_compilers(spec, monkeypatch):
    """Full-size models, traced and lowered; within 5 %: what is left out is elementwise. The vocabulary's logits at
    once: the compiler counts the body of a loop one time."""
    monkeypatch.setattr("vlp.losses.caption.LOGITS_BYTES", 1 << 60)
    parts, mesh = prepared(
        f"{runs.ROOT / 'configs'}/{spec}", "batch=64", "mesh.fsdp=8", "mesh.data=1"
    )
    ours = compiled.step_flops(parts, mesh)["flops_per_example"]
    assert ours == pytest.approx(unrolled_flops(parts), rel=0.05)


def test_flops_of_what_is_computed_again_and_of_masking():
    wide = ("model.image_tower.depth=4", "model.text_tower.depth=4")
    plain = compiled.step_flops(*prepared(SMOKE, *wide))
    again = ("model.image_tower.remat=full", "model.text_tower.remat=full")
    full = compiled.step_flops(*prepared(SMOKE, *wide, *again))
    assert plain["flops_per_example"] == full["flops_per_example"]
    assert plain["step_flops_per_example"] == pytest.approx(plain["flops_per_example"], rel=0.02)
    assert 1.15 < full["step_flops_per_example"] / full["flops_per_example"] < 1.34
    fused = compiled.step_flops(*prepared(SMOKE, *wide, "model.image_tower.attention=splash"))
    assert fused["flops_per_example"] == plain["flops_per_example"]
    assert fused["step_flops_per_example"] > plain["step_flops_per_example"]
    masked = compiled.step_flops(*prepared(SMOKE, *wide, "objective.keep_ratio=0.5"))
    assert masked["unmasked_flops_per_example"] == plain["flops_per_example"]
    assert masked["flops_per_example"] < plain["flops_per_example"]


def test_flops_count_loops_and_shards():
    x = jnp.ones((8, 4))
    twice = lambda x: jax.lax.scan(lambda c, _: (c @ jnp.eye(4), None), x, None, length=3)[0]
    assert flops.of(twice, x) == 3 * 2 * 8 * 4 * 4
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")
    parted = jax.shard_map(lambda x: x @ jnp.eye(4), mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops.of(parted, x) == 2 * 8 * 4 * 4
    q = jnp.ones(
        (3, 128, 2, 8)
    )  # a Pallas kernel: its body times its grid, here examples and heads
    fused = lambda q: attend(q, q, q, kernel="splash")
    assert flops.of(fused, q) == flops.of(lambda q: attend(q, q, q), q) == 3 * 2 * 4 * 128 * 128 * 8


def test_collectives_are_counted_in_loops():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")

    def body(x):
        step = lambda c, _: (c + jax.lax.all_gather(c, "a", tiled=True).sum(0, keepdims=True), None)
        return jax.lax.scan(step, x, None, length=5)[0]

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = f.lower(jnp.ones((8, 16))).compile().as_text()
    found = hlo.collectives(text, 8)
    assert {k: (v.count, v.sent_bytes) for k, v in found.items()} == {
        "all-gather": (5, 5 * 7 / 8 * 8 * 16 * 4)
    }
    kernels = text.replace(", metadata={", ', config={\n"of a kernel": {}\n}}, metadata={')
    assert kernels != text and hlo.collectives(kernels, 8) == found


def test_collectives_of_one_shard_map_are_counted_each():
    """They share a channel. A gather in two stages sends as much as one at once."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")
    near, far = [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]

    def body(x, y):
        at_once = jax.lax.all_gather((x, y), "a", tiled=True)
        staged = jax.lax.all_gather(x, "a", axis_index_groups=near, tiled=True)
        staged = jax.lax.all_gather(staged, "a", axis_index_groups=far, tiled=True)
        return at_once, staged * 2

    out = (jax.sharding.PartitionSpec(),) * 2
    f = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=out, check_vma=False)
    )
    found = hlo.collectives(f.lower(jnp.ones((8 * 16, 8)), jnp.ones((8, 8))).compile().as_text(), 8)
    part = 16 * 8 * 4
    assert set(found) == {"all-gather"}
    assert found["all-gather"].sent_bytes == 7 * part + 7 * 8 * 4 + (part + 3 * 2 * part)


@pytest.mark.parametrize(
    "line, sent",
    [
        ("(f32[128], f32[1024]) all-gather-start(f32[128] %p)", 7 / 8 * 4096),
        ("f32[1024] all-reduce-start(f32[1024] %p)", 2 * 7 / 8 * 4096),
        ("(f32[1024], f32[128]) reduce-scatter-start(f32[1024] %p)", 7 / 8 * 4096),
        ("f8e4m3fn[1024]{0} all-gather(f8e4m3fn[128] %p)", 7 / 8 * 1024),
        ("pred[1024]{0} all-gather(pred[128] %p)", 7 / 8 * 1024),
        ("(f32[1024], f32[1024], u32[], u32[]) collective-permute-start(f32[1024] %p)", 4096 + 4),
    ],
)
def test_collectives_are_read_in_every_form(line, sent):
    text = f"HloModule m\n\nENTRY %main (p: f32[1]) -> f32[1] {{\n  %c = {line}, channel_id=1\n}}\n"
    (found,) = hlo.collectives(text, 8).values()
    assert (found.count, found.sent_bytes) == (1, sent)


def test_mfu_is_told_where_the_peak_is_known(monkeypatch):
    from vlp.core.chips import Chip

    parts, mesh = prepared()
    assert metrics.flops_frac(parts, mesh) is None  # a CPU
    assert "time/mfu" not in metrics.Clock(8).read()
    flops_each = compiled.step_flops(parts, mesh)["flops_per_example"]
    monkeypatch.setitem(metrics.CHIPS, "cpu", Chip(flops=1e9, hbm_bytes=1))
    frac = metrics.flops_frac(parts, mesh)
    assert frac == pytest.approx(flops_each / 8e9)
    ticks = iter([0.0, 2.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(ticks))
    watch = metrics.Clock(8, frac)
    watch.count()  # 8 examples in 2 s
    assert watch.read()["time/mfu"] == pytest.approx(4 * frac, rel=1e-3)


def test_micro_batches_divide_the_estimate():
    """The estimate sees what micro-batches do, with and without computing them again."""
    deep = ("batch=512", "model.image_tower.depth=4", "model.image_tower.remat=full")
    peak = lambda *over: estimate.peak(*prepared(SMOKE, *deep, *over)).held_bytes
    whole, kept, again = (
        peak(),
        peak("micro_batches=4", "micro_remat=blocks"),
        peak("micro_batches=4", "micro_remat=full"),
    )
    assert again < kept < whole


def test_the_plan_compiles_for_devices_and_writes_its_rows(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert runs.vlp("plan", "--config", SMOKE, "--devices", 8, "--alone", "--json", file) == 0
    printed = capsys.readouterr().out
    assert "the compiler's verdict" in printed and "all-reduce" in printed and "MFU" not in printed
    (row,) = json.loads(file.read_text())
    assert row["how"] == "compiled" and row["peak_bytes"] > row["param_bytes"] + row["opt_bytes"]
    assert row["loss_peak_bytes"] < row["peak_bytes"] > row["eval_peak_bytes"]


def test_what_would_fit_is_found_by_trying(monkeypatch):
    """A device with less memory than the step wants: the first cheaper setting that does."""
    target = CPU()
    wide = ("batch=64", "model.image_tower.depth=4", "objective.keep_ratio=1.0")
    config = configs.load(SMOKE, wide)
    peak = lambda c: memory_search.check(c, target, fast=True)[0]["peak_bytes"]
    patches = dict((flags, patch) for patch, flags in memory_search.candidates(config, 0))
    first, *_ = (f for f in patches if "micro_batches=2" in f and "micro_remat=blocks" in f)
    limit = peak(configs.overlay(config, patches[first])) / 0.97 + 1
    monkeypatch.setattr(compiled, "usable_bytes", lambda target: limit)
    (row,) = memory_search.check(config, target, fast=True)
    assert row["fits"] is False and row["would_fit"]
    assert row["would_fit/peak_bytes"] <= limit < row["peak_bytes"]


def test_what_would_fit_is_told_in_flags_that_do():
    """Also where a stage has words of its own."""
    config = configs.load(SMOKE)
    config["stages"][0] |= {"micro_batches": 1, "model": {"image_tower": {"remat": "none"}}}
    for patch, flags in memory_search.candidates(config, 0):
        by_flags = configs.load(SMOKE)
        by_flags["stages"][0] |= {"micro_batches": 1, "model": {"image_tower": {"remat": "none"}}}
        for flag in flags.split():
            configs._override(by_flags, flag.removeprefix("--config."))
        assert parse(by_flags) == parse(configs.overlay(config, patch))
        assert parse(by_flags)[1][0].model.image_tower.remat == "full"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--slices", "2"], "--slices: got 2, expected a --topology"),
        (["--stage", "stage0"], "--stage, --alone: got no target"),
        (["--devices", "8", "--fast", "--alone"], "--alone: got --fast"),
        (["--devices", "8", "--json", "/tmp"], "--json: got the directory"),
        (["--fast"], "--fast: got no target"),
        (["--devices", "8", "--mfu", "2"], "--mfu: got 2.0"),
        (["--devices", "8", "--stage", "nope"], "--stage: got 'nope'"),
        (["--devices", "0"], "--devices: got 0, expected 1 to"),
        (["--gpu", "H1000:8"], "--gpu: got 'H1000', expected one of"),
        (["--gpu", "H100:no"], "--gpu: got 'H100:no', expected a kind and a number"),
        (["--gpu", "H100:8", "--alone"], "--alone: got --gpu H100:8, which is estimated"),
        (["--devices", "8", "--config.batch=12"], "config.batch: got 12"),
        (["--devices", "8", "--config.micro_remat=some"], "config.micro_remat: got 'some'"),
    ],
)
def test_mistakes_of_vlp_plan_are_one_line(capsys, argv, said):
    assert runs.vlp("plan", "--config", SMOKE, *argv) == 2
    assert capsys.readouterr().err.startswith(f"vlp: {said}")


MAIN = "import sys; from vlp.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--gpu"], "on 8 × NVIDIA H100 80GB HBM3 (imagined)"),
        (["--gpu", "A100-SXM4-40:2"], "on 2 × NVIDIA A100-SXM4-40GB (imagined)"),
        (["--devices", "2", "--fast"], "on 2 CPU devices"),
    ],
)
def test_devices_that_are_not_here(argv, said):
    """In a process of its own, as JAX learns the number of its devices once."""
    out = subprocess.run(
        [sys.executable, "-c", MAIN, "plan", "--config", SMOKE, *argv],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert said in out.stdout
    assert "an estimate, nothing compiled" in out.stdout
    assert ("fits: of" in out.stdout) == (argv[0] == "--gpu")


def test_large_parameters_must_be_divided():
    from vlp.core.check import UserError

    big = ("model.text_tower.vocab=16381", "model.text_tower.width=31", "model.text_tower.heads=1")
    with pytest.raises(UserError, match="config.mesh: got .* that fsdp=8 does not divide"):
        prepared(SMOKE, *big, "mesh.fsdp=8")
    parts, _ = prepared(SMOKE, *big, "mesh.fsdp=8", "mesh.allow_replicated=True")
    assert dataclasses.is_dataclass(parts)


@pytest.mark.skipif(not os.environ.get("VLP_SLOW"), reason="ten minutes: VLP_SLOW=1 pytest -k v5e")
def test_coca_base_fits_v5e_4x4_as_documented(tmp_path):
    """The TPU compiler's verdict on 16,384 pairs on 16 chips, beside the row of docs/plans.md."""
    pytest.importorskip("libtpu")
    out = tmp_path / "rows.json"
    argv = [sys.executable, "benchmarks/plans.py", "--only", "base", "--json", out]
    subprocess.run(argv, check=True, cwd=runs.ROOT)
    (row,) = json.loads(out.read_text())
    page = (runs.ROOT / "docs" / "plans.md").read_text()
    told = re.search(r"\| base \| v5e:4x4 \|.*?, 4 \| ([\d.]+) \|", page).group(1)
    assert row["fits"] and row["batch"] == 16_384
    assert row["peak_bytes"] / 2**30 == pytest.approx(float(told), rel=0.03)


@pytest.mark.parametrize(
    "shape, held",
    [
        ((estimate.PRIME, 197, 768), (estimate.PRIME, 200, 768)),
        ((estimate.PRIME, 50, 3, 12, 64), (3, estimate.PRIME, 56, 768)),  # q, k, v of 12 heads
        ((estimate.PRIME, 768), (estimate.PRIME, 768)),
        ((12, 197, 1000), (12, 200, 1024)),
    ],
)
def test_the_estimate_counts_the_tiles_of_a_tpu(shape, held):
    assert estimate._padded(shape) == held
