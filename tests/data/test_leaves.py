"""The leaves of a batch: content, law, mask, a record without the field, a field that is wrong, a leaf of one's own."""

import dataclasses
import io
import pathlib
import re
import textwrap

import numpy as np
import pytest
from PIL import Image

from vlp.core import check, plugins
from vlp.data import leaves, records
from vlp.data.config import Data, SentenceSet, StoredArray, TextSlot, ViewSet
from vlp.data.dataset import Dataset, open_dataset

NUM, PX, LEN = 24, 16, 12
CROPS = [
    {"box": [0.0, 0.0, 0.5, 1.0], "flip": False},
    {"box": [0.5, 0.25, 1.0, 1.0], "flip": True},
    {"box": [0.25, 0.0, 0.75, 0.5], "flip": False},
]
DATA = Data(
    image_px=PX, text_len=LEN, read_threads=0, flip=True, min_area_frac=0.3,
    slots={"alt": TextSlot(), "said": TextSlot(("alt", "long"), captions="first")},
    views={"local": ViewSet(num=3, px=8), "big": ViewSet(num=1, px=12, min_area_frac=0.9, max_area_frac=1.0)},
    sentences=SentenceSet(num=3), num_boxes=3, num_negatives=2, num_negative_images=2,
    stored={"clip": StoredArray((4,)), "tokens": StoredArray((2, 3)), "text": StoredArray((5,), of="record")},
    classes=("cat", "dog"),
)  # fmt: skip
READS = {  # of every leaf, what an objective may name
    "image": ("image",),
    "image.box": ("image.box",),
    "views": ("views.local", "views.big"),
    "text": ("text",),
    "text.slot": ("text.alt", "text.said"),
    "sentences": ("sentences",),
    "label": ("label",),
    "weight": ("weight",),
    "boxes": ("boxes",),
    "negatives.text": ("negatives.text",),
    "negatives.image": ("negatives.image",),
    "stored": ("stored.clip", "stored.tokens", "stored.text"),
}
ALL = tuple(name for names in READS.values() for name in names)
FIELD = {  # of every optional leaf: the record's field, a value that is wrong, and what is said of it
    "text.slot": ("captions", [{"text": 1, "source": "alt", "lang": "en"}], "captions"),
    "sentences": ("captions", [{"text": 1, "source": "alt", "lang": "en"}], "captions"),
    "label": ("label", "bird", "label 'bird', expected 0 … 1, or one of config.data.classes"),
    "weight": ("weight", -1.0, "weight -1.0, expected a finite number from 0 on"),
    "boxes": ("boxes", [{"box": [0, 0, 2, 1], "text": "a"}], "expected a list of {box"),
    "negatives.text": ("negatives", [3], "expected a list of strings"),
    "negatives.image": ("negative_images", [b"no image"], "not_an_image"),
    "stored": ("embeddings", {"clip": np.zeros((3, 5), "f4")}, r"\(3, 5\), expected \(3, 4\)"),
}


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def record(i: int) -> dict:
    """All fields; the left half of the image is dark, the right half bright."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 80, (40 + i, 60, 3), dtype=np.uint8)
    pixels[:, 30:] += 150
    long = "Red cat. Green dog! Blue bird? A cat sits on red. Dog runs."
    captions = [
        {"text": "red cat", "source": "web", "lang": "en"},
        {"text": f"{'green blue'.split()[i % 2]} dog", "source": "alt", "lang": "en"},
        {"text": "blue bird", "source": "alt", "lang": "en"},
        {"text": long, "source": "long", "lang": "en"},
    ]
    return {
        "key": f"k{i}", "image": png(pixels), "captions": captions, "label": ("cat", "dog")[i % 2], "weight": 0.5 + i,
        "boxes": [{"box": [0.0, 0.0, 0.5, 1.0], "text": "red"}, {"box": [0.5, 0.0, 1.0, 1.0], "text": "blue"}],
        "negatives": ["green", "blue", "cat"], "negative_images": [png(255 - pixels)],
        "crops": CROPS,
        "embeddings": {
            "clip": (np.arange(3)[:, None] + 10.0 * i + np.zeros((3, 4))).astype(np.float32),
            "tokens": (np.arange(3)[:, None, None] + np.zeros((3, 2, 3))).astype(np.float16),
            "text": np.full(5, i, np.float32),
        },
    }  # fmt: skip


class Listed:
    """Records in memory; `change(i, record)` changes each."""

    fingerprint = "listed"

    def __init__(self, tokenizer, change=lambda i, record: record):
        self.words, self.change = tokenizer, change

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        return self.change(i, record(i))

    def tokenizer(self):
        return self.words


def made(tokenizer, reads=ALL, change=lambda i, record: record, **data):
    source = Listed(tokenizer, change)
    return Dataset(dataclasses.replace(DATA, **data), source, tokenizer, reads=tuple(reads))


@pytest.fixture(scope="module")
def batch(small_tokenizer):
    return made(small_tokenizer).batch_at(5, NUM, 7)


def ids(batch):
    return batch["record"][:, 1].astype(int)


def words(tokenizer, ids_L):
    return tokenizer.decode(ids_L)


def test_each_leaf_is_tested():
    missing = sorted(leaves.LEAVES.keys() - READS.keys())
    assert not missing, (
        f"leaves {missing} of vlp/data/leaves.py are not tested. Add here: in READS, what an objective reads of "
        f"each ({missing[0]!r}: ({missing[0]!r},)); in DATA, the config that makes it; in `record`, its "
        "field; in FIELD, if a record may lack it, a wrong value and the error."
    )


@pytest.mark.parametrize("reads", [*READS.values(), ALL], ids=[*READS, "all"])
def test_what_is_not_read_is_not_made(small_tokenizer, batch, reads):
    """And a leaf is the same whatever else is read, but for the image, which stored crops change."""
    alone = made(small_tokenizer, reads).batch_at(5, NUM, 7)
    spec = leaves.spec(DATA, NUM, reads)
    assert {k: (v.shape, v.dtype) for k, v in alone.items()} == {
        k: (shape, np.dtype(dtype)) for k, (shape, dtype) in spec.items()
    }
    assert set(leaves.ALWAYS) <= set(spec) and set(reads) <= set(spec)
    for name, array in alone.items():
        if not name.startswith(("image", "boxes")):
            np.testing.assert_array_equal(array, batch[name], err_msg=name)


def test_no_leaf_changes_the_draws_of_another(small_tokenizer):
    plain = made(small_tokenizer, leaves.READS).batch_at(0, NUM, 3)
    more = [name for name in ALL if not name.startswith("stored")]
    full = made(small_tokenizer, more).batch_at(0, NUM, 3)
    for name in plain:
        np.testing.assert_array_equal(plain[name], full[name], err_msg=name)
    fewer = {"local": ViewSet(num=1, px=8)}
    few = made(small_tokenizer, ("views.local",), views=fewer).batch_at(0, NUM, 3)
    np.testing.assert_array_equal(few["views.local"][:, 0], full["views.local"][:, 0])


def test_every_leaf_is_the_same_on_any_hosts_workers_and_restarts(small_tokenizer):
    d = made(small_tokenizer, read_threads=2)
    whole = list(d.train_iter(start=3, batch=8, num_batches=4, seed=1))
    for hosts in (2, 4):
        rows = [range(h * 8 // hosts, (h + 1) * 8 // hosts) for h in range(hosts)]
        parts = [d.train_iter(start=3, batch=8, num_batches=4, seed=1, rows=[r]) for r in rows]
        for want, got in zip(whole, zip(*parts), strict=True):
            for name in want:
                joined = np.concatenate([p[name] for p in got])
                np.testing.assert_array_equal(joined, want[name], err_msg=name)
    resumed = list(d.train_iter(start=3 + 16, batch=8, num_batches=2, seed=1))
    for want, got in zip(whole[2:], resumed, strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_texts_by_role(small_tokenizer, batch):
    tok = small_tokenizer
    first = {tok.encode(f"{c} dog", LEN).tobytes() for c in ("green", "blue")}
    second = tok.encode("blue bird", LEN).tobytes()
    got = [row.tobytes() for row in batch["text.alt"]]
    assert second in got and set(got) <= first | {second} and set(got) & first
    want = [tok.encode(f"{'green blue'.split()[i % 2]} dog", LEN) for i in ids(batch)]
    np.testing.assert_array_equal(batch["text.said"], want)
    assert batch["text.alt.mask"].all() and batch["text.said.mask"].all()
    np.testing.assert_array_equal(batch["text"], [tok.encode("red cat", LEN)] * NUM)


def test_captions_are_not_repeated(small_tokenizer):
    d = made(small_tokenizer, ("text",), captions="all", num_captions=6)
    for found in (d.batch_at(0, NUM, 0), d.eval_batch(0, NUM)):
        assert found["text.mask"].sum(1).tolist() == [4] * NUM and found["text.mask"][:, :4].all()
        empty = small_tokenizer.encode("", LEN)
        np.testing.assert_array_equal(found["text"][:, 4:], np.broadcast_to(empty, (NUM, 2, LEN)))


def test_sentences(small_tokenizer, batch):
    said = ["Red cat.", "Green dog!", "Blue bird?", "A cat sits on red.", "Dog runs."]
    coded = {small_tokenizer.encode(s, LEN).tobytes(): s for s in said}
    found = [[coded[x.tobytes()] for x in row] for row in batch["sentences"]]
    assert all(len({*row}) == 3 for row in found) and {s for row in found for s in row} == {*said}
    assert batch["sentences.mask"].all() and len({tuple(row) for row in found}) > 8
    d = made(small_tokenizer, ("sentences",), sentences=SentenceSet(num=7, max_joined=2))
    assert d.batch_at(0, NUM, 0)["sentences.mask"].sum(1).tolist() == [5] * NUM
    assert d.eval_batch(0, 1)["sentences"][0, 0].tobytes() in coded
    other = made(small_tokenizer, ("sentences",), sentences=SentenceSet(num=2, sources=("web",)))
    one = other.batch_at(0, NUM, 0)
    assert one["sentences.mask"].tolist() == [[True, False]] * NUM


def test_label_and_weight(batch):
    np.testing.assert_array_equal(batch["label"], ids(batch) % 2)
    np.testing.assert_array_equal(batch["weight"], 0.5 + ids(batch))
    assert batch["label.mask"].all()


def bright(image_RRC):
    """Share of the columns that are bright."""
    return (image_RRC.mean((0, 2)) > 115).mean()


def test_boxes_say_where_views_and_the_image_lie(small_tokenizer):
    """The right half of every image is bright: a box tells how much of a crop is."""
    d = made(small_tokenizer, ("image", "image.box", "views.local"))
    found = d.batch_at(0, 2 * NUM, 1)
    views = [
        found[f"views.local{x}"].reshape(-1, *found[f"views.local{x}"].shape[2:])
        for x in ("", ".boxes", ".flip")
    ]
    for images, boxes, flips in ((found["image"], found["image.box"], found["image.flip"]), views):
        assert 0.3 < flips.mean() < 0.7
        for image, (x0, y0, x1, y1), flip in zip(images, boxes, flips, strict=True):
            assert 0 <= x0 < x1 <= 1.0001 and 0 <= y0 < y1 <= 1.0001
            share = np.clip((x1 - 0.5) / (x1 - x0), 0, 1)
            assert abs(bright(image) - share) < 0.5 / len(image) + 0.1
            if 0.2 < share < 0.8:  # which side
                sides = image.mean((0, 2))
                assert (sides[0] > sides[-1]) == flip
    area = np.prod(found["views.local.boxes"][..., 2:] - found["views.local.boxes"][..., :2], -1)
    assert 0.05 <= area.min() + 1e-4 and area.max() <= 0.4 + 1e-4 and area.std() > 0.05


def test_boxes_follow_the_crop(small_tokenizer):
    d = made(small_tokenizer, ("image", "boxes"), translate_frac=0.2)
    found = d.batch_at(0, 2 * NUM, 1)
    red, blue = (small_tokenizer.encode(t, LEN).tobytes() for t in ("red", "blue"))
    kept = 0
    for image, boxes, texts, mask in zip(
        *(found[k] for k in ("image", "boxes", "boxes.text", "boxes.mask")), strict=True
    ):
        assert (
            not mask[2] and mask.any() and boxes[~mask].tolist() == [[0, 0, 1, 1]] * (~mask).sum()
        )
        for (x0, y0, x1, y1), text in zip(boxes[mask], texts[mask]):
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 and text.tobytes() in (red, blue)
            inner = image[:, int(np.ceil(x0 * PX)) + 1 : int(x1 * PX) - 1]
            inner = inner[int(np.ceil(y0 * PX)) + 1 : int(y1 * PX) - 1]
            if inner.size and text.tobytes() == blue:
                assert inner.mean() > 150
            elif inner.size:
                assert inner.mean() < 90
            kept += inner.size > 0
    assert kept > NUM
    whole = d.eval_batch(0, 1)  # the centre square of 60 × 40
    np.testing.assert_allclose(whole["boxes"][0, :2, [0, 2]], [[0, 0.5], [0.5, 1]], atol=1e-6)


def test_negatives(small_tokenizer, batch):
    known = {small_tokenizer.encode(t, LEN).tobytes() for t in ("green", "blue", "cat")}
    rows = [[x.tobytes() for x in row] for row in batch["negatives.text"]]
    assert (
        all(len({*row}) == 2 and {*row} <= known for row in rows)
        and batch["negatives.text.mask"].all()
    )
    assert batch["negatives.image.mask"].tolist() == [[True, False]] * NUM
    assert not batch["negatives.image"][:, 1].any() and batch["negatives.image"][:, 0].mean() > 60
    crops = batch["negatives.image"][:, 0].mean((1, 3))
    assert len({row.tobytes() for row in crops}) == NUM


def test_stored_arrays_belong_to_the_crop_that_the_image_shows(small_tokenizer, batch):
    chosen = batch["stored.clip"][:, 0] - 10 * ids(batch)
    assert set(chosen.tolist()) == {0.0, 1.0, 2.0} and batch["stored.clip.mask"].all()
    np.testing.assert_array_equal(
        batch["stored.tokens"], chosen[:, None, None] + np.zeros((NUM, 2, 3))
    )
    np.testing.assert_array_equal(batch["stored.text"], np.repeat(ids(batch)[:, None], 5, 1))
    for k, box, flip, image in zip(
        chosen.astype(int), batch["image.box"], batch["image.flip"], batch["image"]
    ):
        np.testing.assert_allclose(box, CROPS[k]["box"], atol=1e-6)
        assert flip == CROPS[k]["flip"] and abs(bright(image) - (0.0, 1.0, 0.5)[k]) < 0.1
    free = made(small_tokenizer, ("image", "stored.text")).batch_at(5, NUM, 7)
    plain = made(small_tokenizer, ("image",)).batch_at(5, NUM, 7)
    np.testing.assert_array_equal(free["image"], plain["image"])  # of="record" fixes no crop
    still = made(small_tokenizer).eval_batch(0, NUM)
    np.testing.assert_array_equal(still["stored.clip"][:, 0], 10 * np.arange(NUM))
    for field in ("jitter", "translate_frac"):
        with pytest.raises(check.UserError, match=f"config.data.{field}: got 0.2 with stored"):
            made(small_tokenizer, ("stored.clip",), **{field: 0.2})


@pytest.mark.parametrize("leaf", FIELD)
def test_a_record_without_the_field(small_tokenizer, leaf):
    """Masked, and nothing else changes; a dataset without any is refused when it is opened."""
    field = FIELD[leaf][0]
    drop = lambda i, r: {k: v for k, v in r.items() if k != field or i % 3}
    if field == "captions":
        drop = lambda i, r: r if i % 3 else r | {"captions": r["captions"][:1]}
    reads = READS[leaf]
    found = made(
        small_tokenizer, reads, drop, sentences=SentenceSet(num=2, sources=("long",))
    ).batch_at(0, NUM, 0)
    lacking = ids(found) % 3 == 0
    full = made(small_tokenizer, reads, sentences=SentenceSet(num=2, sources=("long",))).batch_at(
        0, NUM, 0
    )
    for name, array in found.items():
        if name.endswith(".mask"):
            assert not array[lacking].any() and array[~lacking].any(), name
        np.testing.assert_array_equal(array[~lacking], full[name][~lacking], err_msg=name)
    if leaf == "weight":
        assert (found["weight"][lacking] == 1).all()
    if leaf == "label":
        assert (found["label"][lacking] == -1).all()


@pytest.mark.parametrize("leaf", [k for k in FIELD if k != "sentences"])
def test_a_field_that_no_record_has_is_refused_at_the_start(
    leaf, tmp_path, small_tokenizer, make_records
):
    records.write(
        tmp_path / "set", {"train": make_records(5)}, name="n", info={},
        files={records.TOKENIZER: small_tokenizer.to_bytes()},
    )  # fmt: skip
    data = dataclasses.replace(DATA, path=str(tmp_path / "set"))
    with pytest.raises(
        check.UserError, match=f"got nothing for {READS[leaf][0]}.* in 5 records looked at"
    ) as e:
        open_dataset(data, reads=READS[leaf])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("leaf", FIELD)
def test_a_wrong_field_is_one_line_or_a_bad_record(small_tokenizer, leaf):
    field, value, words = FIELD[leaf]
    spoil = lambda i, r: r | {field: value} if i == 4 else r
    strict = made(small_tokenizer, READS[leaf], spoil, shuffle=False)
    with pytest.raises(check.UserError, match=words) as e:
        strict.batch_at(0, NUM, 0)
    assert "\n" not in str(e.value)
    lax = made(
        small_tokenizer, READS[leaf], spoil, shuffle=False, bad_records="replace", max_bad_frac=1.0
    )
    rows = list(lax.train_iter(start=0, batch=NUM, num_batches=1, seed=0))
    assert ids(rows[0])[4] != 4 and lax.loader_stats.bad.total() == 1


def test_stored_arrays_without_their_crops_are_refused(small_tokenizer):
    bare = lambda i, r: {k: v for k, v in r.items() if k != "crops"}
    with pytest.raises(check.UserError, match="expected also the field crops"):
        made(small_tokenizer, ("stored.clip",), bare).batch_at(0, 2, 0)


@pytest.mark.parametrize(
    "name, words",
    [
        ("views.lokal", "set in config.data: views"),
        ("text.caption", "slots"),
        ("stored.dino", "set in config.data: stored"),
        ("pictures", "name one of them in the objective's reads"),
    ],
)
def test_a_leaf_that_no_config_makes_is_one_line(name, words):
    with pytest.raises(check.UserError, match=words) as e:
        leaves.spec(DATA, 4, ("image", name))
    assert (
        repr(name) in str(e.value) and "'views.local'" in str(e.value) and "\n" not in str(e.value)
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"views": {"a": ViewSet(num=0)}}, "config.data.views.a.num: got 0, expected in 1 … 256"),
        ({"views": {"a.b": ViewSet()}}, "config.data.views: got 'a.b'"),
        ({"views": {"a": ViewSet(min_area_frac=0.5)}}, "views.a.min_area_frac: got 0.5"),
        ({"slots": {"mask": TextSlot()}}, "config.data.slots: got 'mask'"),
        ({"slots": {"a": TextSlot(captions="all")}}, "slots.a.captions: got 'all'"),
        ({"stored": {"a": StoredArray(())}}, r"stored.a.shape: got \(\)"),
        ({"stored": {"a": StoredArray((3,), of="image")}}, "stored.a.of: got 'image'"),
        ({"sentences": SentenceSet(num=0)}, "config.data.sentences.num: got 0"),
        ({"num_boxes": 0}, "config.data.num_boxes: got 0, expected in 1 … 1,024"),
        ({"classes": ("a", "a")}, "config.data.classes"),
    ],
)
def test_sections_that_cannot_work(change, words):
    with pytest.raises(check.UserError, match=words):
        open_dataset(dataclasses.replace(DATA, source="shapes", **change))


def test_shapes_have_what_most_leaves_read():
    """So that smoke runs need no data: boxes lie on the shape, negatives are no captions of it."""
    reads = ("image", "text", "label", "boxes", "negatives.text", "sentences", "views.local")
    data = Data(source="shapes", num_records=64, views={"local": ViewSet()}, image_px=32)
    d = open_dataset(data, reads=reads)
    found = d.eval_batch(0, 64)
    assert found["boxes.mask"].sum(1).tolist() == [1] * 64 and found["negatives.text.mask"].all()
    for i in range(64):
        r = d.record(i)
        x0, y0, x1, y1 = (round(64 * share) for share in r["boxes"][0]["box"])
        ground = r["image"][0, 0]
        assert (r["image"][y0 : y1 + 1, x0 : x1 + 1] != ground).any()
        away = r["image"].copy()
        away[max(y0 - 1, 0) : y1 + 2, max(x0 - 1, 0) : x1 + 2] = ground
        assert (away == ground).all()
        assert not {*r["negatives"]} & {c["text"] for c in r["captions"]}


def test_the_page_of_the_docs_names_every_leaf():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in (x for leaf in leaves._known(DATA, ()).values() for x in leaf.spec(DATA, 1)):
        family = re.sub(r"^(views|stored)\.\w+", r"\1", re.sub(r"^text\.(alt|said)", "text", name))
        assert f"`{family}" in page or f"`.{family.rpartition('.')[2]}`" in page, name


@dataclasses.dataclass(frozen=True)
class Brightness:
    """brightness f32[B]: a leaf in one dataclass."""

    def spec(self, data, batch):
        return {"brightness": ((batch,), np.float32)}

    def fill(self, record, draws, row):
        row["brightness"][...] = (
            record["image"].pixels()[0].mean() + draws.rng("brightness").random()
        )


def test_a_leaf_of_ones_own_is_one_dataclass_and_one_line(small_tokenizer, monkeypatch):
    monkeypatch.setitem(leaves.LEAVES, "brightness", Brightness)
    found = made(small_tokenizer, ("image", "brightness")).batch_at(0, NUM, 0)
    assert found["brightness"].shape == (NUM,) and 90 < found["brightness"].mean() < 130
    plain = made(small_tokenizer, ("image",)).batch_at(0, NUM, 0)
    np.testing.assert_array_equal(found["image"], plain["image"])


def test_a_leaf_from_a_plugin(tmp_path, small_tokenizer):
    """Also in worker processes, which import the plugin's file themselves."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""\
        import dataclasses
        import numpy as np

        @dataclasses.dataclass(frozen=True)
        class Place:
            def spec(self, data, batch):
                return {"place": ((batch,), np.int64)}

            def fill(self, record, draws, row):
                row["place"][...] = draws.position

        LEAVES = {"place": Place}
        """)
    )
    plugin = plugins.Plugin(**plugins.of_file(tmp_path / "mine.py"))
    reads, found = ("place", "image", "views.local", "image.box"), []
    for workers in (0, 1):
        views = {"local": ViewSet(num=2, px=4)}
        data = Data(source="shapes", num_records=9, image_px=8, workers=workers, views=views)
        d = open_dataset(data, reads=reads, plugins=(plugin,))
        found.append(list(d.train_iter(start=4, batch=3, num_batches=2, seed=0)))
        assert [b["place"].tolist() for b in found[-1]] == [[4, 5, 6], [7, 8, 9]]
    for want, got in zip(*found, strict=True):
        assert want.keys() == got.keys() and {*reads} < {*want}
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_plugin_may_not_take_a_leafs_name(small_tokenizer, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other(Brightness):
        def spec(self, data, batch):
            return {"text": ((batch,), np.float32)}

    monkeypatch.setitem(leaves.LEAVES, "other", Other)
    with pytest.raises(check.UserError, match="batch leaf Other: got 'text', which Text makes"):
        made(small_tokenizer, ("text",))


def test_records_keep_the_new_fields():
    whole = record(3)
    back = records.decode(records.encode(whole))
    assert back["crops"] == CROPS and back["weight"] == 3.5
    assert back["negative_images"] == whole["negative_images"]
    np.testing.assert_array_equal(back["embeddings"]["tokens"], whole["embeddings"]["tokens"])
    for field, value in (
        ("crops", [{"box": [0.5, 0, 0.5, 1], "flip": False}]),
        ("crops", [{"box": [0, 0, 1, 1]}]),
        ("weight", -1),
        ("negative_images", ["a"]),
    ):
        with pytest.raises(check.UserError, match=f"got {field}"):
            records.encode(whole | {field: value})
