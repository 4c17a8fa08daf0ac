"""Parameter counts of the papers' towers, from shapes alone."""

import flax.linen as nn
import pytest

from configs import towers
from helpers.everything import abstract
from vlp.core.config import build_named
from vlp.models import MODELS
from vlp.train import summary


def counts(section, image_px=224, text_len=77):
    """Millions of parameters: image, text (each without its projection), projections, total."""
    model = build_named(MODELS, section, "config.model")
    params = nn.unbox(abstract(model, image_px, text_len))
    found = {k: v / 1e6 for k, v in summary.parameters(model, params).items()}
    return found | {"joint": found.get("projections and heads", 0)}


@pytest.mark.parametrize(
    ("size", "image", "text"), [("B/16", 86, 53), ("L/16", 303, 109), ("H/14", 631, 334)]
)
def test_flips_towers_have_the_papers_counts(size, image, text):
    """FLIP's table (model sizes), printed in whole millions: within 0.5 % or half of the last digit."""
    found = counts(towers.flip(size), text_len=32)
    assert found["image"] == pytest.approx(image, rel=0.005, abs=0.5)
    assert found["text"] == pytest.approx(text, rel=0.005, abs=0.5)


# image_mparams and text_mparams (projections included), mparams of open_clip's docs/model_profile.csv.
OPEN_CLIP = {
    "S/32": (22.64, 40.44, 63.09),
    "S/16": (21.81, 40.44, 62.26),
    "B/32": (87.85, 63.43, 151.28),
    "B/16": (86.19, 63.43, 149.62),
    "L/16": (304.09, 123.65, 427.74),
    "L/14": (303.97, 123.65, 427.62),
    "H/14": (632.08, 354.03, 986.11),
    "g/14": (1012.65, 354.03, 1366.68),
    "G/14": (1844.91, 694.66, 2539.57),
}


@pytest.mark.parametrize("size", OPEN_CLIP)
def test_clips_towers_have_open_clips_counts(size):
    """To the last printed digit."""
    section = originals_vocabulary(towers.clip(size))
    found = counts(section)
    image, text = section["image_tower"]["width"], section["text_tower"]["width"]
    embed = section["embed"] / 1e6
    want = OPEN_CLIP[size]
    assert found["image"] + image * embed == pytest.approx(want[0], abs=0.0051)
    assert found["text"] + text * embed == pytest.approx(want[1], abs=0.0051)
    assert found["total"] == pytest.approx(want[2], abs=0.0051)


def originals_vocabulary(section):
    """Without the two rows of the table that our numbering adds."""
    section["text_tower"]["vocab"] -= 2
    return section


@pytest.mark.parametrize(("size", "total"), [("B/32", 253.56), ("L/14", 638.45)])
def test_open_clips_coca_has_its_count(size, total):
    """The same table's coca_ViT-B-32 and coca_ViT-L-14."""
    found = counts(originals_vocabulary(towers.open_clip_coca(size)), text_len=76)
    assert found["total"] == pytest.approx(total, abs=0.0051)


def test_clips_b32_has_openais_count():
    assert round(counts(originals_vocabulary(towers.clip("B/32")))["total"] * 1e6) == 151_277_313


# The same table's rows ViT-B-16-SigLIP, ViT-L-16-SigLIP-256, ViT-SO400M-14-SigLIP: pixels, text length, counts.
SIGLIP = {
    "B/16": (224, 64, 92.88, 110.27, 203.16),
    "L/16": (256, 64, 315.96, 336.19, 652.15),
    "So400m/14": (224, 16, 427.68, 449.68, 877.36),
}


@pytest.mark.parametrize("size", SIGLIP)
def test_siglips_towers_have_open_clips_counts(size):
    px, length, image, text, total = SIGLIP[size]
    found = counts(towers.siglip(size), px, length)
    assert found["image"] == pytest.approx(image, abs=0.0051)
    assert found["text"] + found["joint"] == pytest.approx(text, abs=0.0051)  # no image projection
    assert found["total"] == pytest.approx(total, abs=0.0051)


@pytest.mark.parametrize(("size", "total"), [("L/14", 414.21), ("H/14", 968.24), ("G/14", 2517.22)])
def test_clipas_towers_have_open_clips_counts(size, total):
    """The same table; its count includes the fixed position table, which is no parameter here."""
    found = counts(towers.clipa(size), text_len=32)
    assert found["total"] == pytest.approx(total, rel=0.005)


def image_parameters(section, image_px=224):
    model = dict(
        name="two_tower",
        image_tower=section,
        text_tower=dict(vocab=8, width=8, depth=1, heads=2),
        embed=8,
    )
    return round(counts(model, image_px, 4)["image"] * 1e6)


# timm's counts with a head of 1,000 classes, less the head (convnext_tiny … convnext_xlarge).
@pytest.mark.parametrize(
    ("size", "count"),
    [("T", 28_589_128), ("S", 50_223_688), ("B", 88_591_464), ("L", 197_767_336), ("XL", 350_196_968)],
)  # fmt: skip
def test_convnext(size, count):
    head = towers.CONVNEXT[size]["widths"][-1] * 1000 + 1000
    assert image_parameters(dict(name="convnext", **towers.CONVNEXT[size])) == count - head


# image_mparams and mparams of open_clip's docs/model_profile.csv.
@pytest.mark.parametrize(
    ("size", "image", "total"),
    [
        ("RN50", 38.32, 102.01),
        ("RN101", 56.26, 119.69),
        ("RN50x4", 87.14, 178.30),
        ("RN50x16", 167.33, 290.98),
        ("RN50x64", 420.38, 623.26),
    ],
)
def test_clip_resnet(size, image, total):
    found = counts(towers.clip(size), towers.RESNET_PX[size])
    assert found["image"] == pytest.approx(image, abs=0.0051)
    assert found["total"] == pytest.approx(total, abs=0.0051)


def test_clip_resnet_to_the_last_parameter():
    """OpenAI's RN50 has 102,007,137; running statistics are no parameters."""
    assert round(counts(originals_vocabulary(towers.clip("RN50")))["total"] * 1e6) == 102_007_137
