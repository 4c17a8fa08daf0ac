"""Tar shards as people make them: sparse, joined, from a Mac, damaged on purpose, oddly named."""

import io
import signal
import tarfile

import pytest
import test_cli_data

from helpers import formats
from vlp.core import check
from vlp.data import records, sources, storage
from vlp.data.sources import fields
from vlp.data.tools import convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    storage.reset()


def archive(rows, *, form=tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, data, {field of TarInfo: value}) with its end mark and padding."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data, *more in rows:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in (more[0] if more else {}).items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pair(key: str, seed: int = 0) -> list[tuple]:
    return [(f"{key}.jpg", formats.jpeg(seed)), (f"{key}.txt", b"a text")]


def opened(tmp_path, data: bytes, **how):
    (tmp_path / "a.tar").write_bytes(data)
    return sources.open_path(tmp_path / "a.tar", **how)


def keys(source) -> list[str]:
    return [source[i]["key"] for i in range(len(source))]


SPARSE = {  # versions of GNU's format: the header's type, pax records
    "gnu": (b"S", {}),
    "0.0": (b"0", {"GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "9"}),
    "0.1": (b"0", {"GNU.sparse.size": "4096", "GNU.sparse.map": "0,512", "GNU.sparse.name": "b.jpg"}),
    "1.0": (b"0", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg"}),
}  # fmt: skip


@pytest.mark.parametrize("version", SPARSE)
def test_sparse_members_are_counted_with_their_sample(tmp_path, version):
    """Their bytes lie elsewhere than those of plain ones: never taken for the picture."""
    kind, pax = SPARSE[version]
    name = "GNUSparseFile.7/b.jpg" if "GNU.sparse.name" in pax else "b.jpg"
    sparse = (name, formats.jpeg(1), {"type": kind, "pax_headers": pax})
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    rows = [*pair("a"), sparse, ("b.txt", b"x"), *pair("c")]
    source = opened(tmp_path, archive(rows, form=form))
    assert keys(source) == ["a", "c"] and source.counts == {"sparse": 1}
    with pytest.raises(check.UserError, match=r"\{'sparse': 1\} beside 2 good"):
        opened(tmp_path, archive(rows, form=form), strict=True)
    pax = {k: v.replace("b.jpg", "a.npy") for k, v in pax.items()}
    unread = ("a.npy", b"1" * 9, {"type": kind, "pax_headers": pax})
    other = [*pair("a"), unread]
    assert keys(opened(tmp_path, archive(other, form=form), strict=True)) == ["a"]


def test_extended_maps_of_sparse_members_are_passed_over(tmp_path):
    """GNU's old format puts further parts of the map into blocks behind the header."""
    rows = [("b.jpg", bytes(1024) + formats.jpeg(1), {"type": b"S"}), ("b.txt", b"x"), *pair("c")]
    data = bytearray(archive(rows))
    size = len(rows[0][1]) - 1024
    data[124:136] = b"%011o\0" % size  # of the body alone; two blocks of the map come before it
    data[482], data[512 + 504] = 1, 1
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    source = opened(tmp_path, bytes(data))
    assert keys(source) == ["c"] and source.counts == {"sparse": 1}


def test_joined_archives_are_read_to_the_end(tmp_path):
    one, two = archive([*pair("a"), *pair("b")]), archive([*pair("b"), *pair("c")])
    source = opened(tmp_path, one + two, strict=True)
    assert keys(source) == ["a", "b", "b", "c"] and source.counts == {}
    source = opened(tmp_path, one + b"\1" * 700)
    assert keys(source) == ["a", "b"] and source.counts == {"trailing": 1}
    assert next(source.left_out)["key"] == "700 bytes from 10240 on"
    with pytest.raises(check.UserError, match="trailing"):
        opened(tmp_path, one + b"\1" * 700, strict=True)


def test_joined_archives_count_what_is_cut(tmp_path):
    one, two = archive([*pair("a"), *pair("b")]), archive([*pair("c"), *pair("d")])
    source = opened(tmp_path, one + two[:2500])
    assert keys(source) == ["a", "b"] and source.counts == {"truncated": 1}


DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(130)
SIDECARS = [
    [("./._a.jpg", DOUBLE), ("./._a.txt", DOUBLE)],
    [("__MACOSX/._a.jpg", DOUBLE), ("__MACOSX/a.txt", DOUBLE)],
    [(".DS_Store", b"x"), ("Thumbs.db", b"x"), ("desktop.ini", b"x"), ("@eaDir/a.jpg", b"x")],
]


@pytest.mark.parametrize("number", range(len(SIDECARS)))
def test_sidecars_of_other_systems_are_no_samples(tmp_path, number):
    first, *rest = SIDECARS[number]
    rows = [first, *pair("./a"), *rest, ("./b.jpg", formats.jpeg(1)), rest[-1], ("./b.txt", b"x")]
    source = opened(tmp_path, archive(rows), strict=True)
    assert [k.removeprefix("./") for k in keys(source)] == ["a", "b"]
    assert source.counts == {"sidecar": len(rest) + 2}
    assert list(source.left_out) == []


def absurd(size: int | bytes) -> bytes:
    """Two good samples around a member that says it has this size."""
    data = bytearray(archive([*pair("a"), ("x.jpg", b""), ("x.txt", b""), *pair("c")]))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = next(m.offset for m in tar if m.name == "x.jpg")
    if isinstance(size, int):
        size = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


ABSURD = {
    "-512": absurd(-512),
    "-1": absurd(-1),
    "far back": absurd(-(2**70)),
    "far on": absurd(2**70),
    "minus in octal": absurd(b"-0000001000\0"),
    "no number": absurd(b"12 apples 89"),
    "pax": archive(
        [*pair("a"), ("x.jpg", b"", {"pax_headers": {"size": "-512"}}), *pair("c")],
        form=tarfile.PAX_FORMAT,
    ),
    "pax text": archive(
        [*pair("a"), ("x.jpg", b"", {"pax_headers": {"size": "many"}}), *pair("c")],
        form=tarfile.PAX_FORMAT,
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_end_the_reading_at_once(tmp_path, name):
    def ring(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    try:
        source = opened(tmp_path, ABSURD[name])
    finally:
        signal.alarm(0)
    assert "x" not in keys(source) and set(source.counts) <= {"damaged", "truncated"}
    assert source.counts
    with pytest.raises(check.UserError, match="beside"):
        opened(tmp_path, ABSURD[name], strict=True)


def test_names_that_claim_gigabytes_are_damage(tmp_path):
    data = bytearray(archive([*pair("0"), *pair("a"), *pair("long/" * 40 + "b")]))
    at = data.index(b"././@LongLink")
    data[at + 124 : at + 136] = b"%011o\0" % 2**32
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    assert opened(tmp_path, bytes(data)).counts.keys() <= {"damaged", "truncated"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    names = ["deep/" * 25 + "a", "ü" * 40, "plain"]
    rows = [member for n in names for member in pair(n)]
    assert keys(opened(tmp_path, archive(rows, form=form), strict=True)) == names
    rows = pair("\udcff")  # a byte that is no UTF-8, as Python reads it
    if form == tarfile.GNU_FORMAT:
        assert keys(opened(tmp_path, archive(rows, form=form))) == ["\\xff"]


def test_compound_names_by_the_fields_given(tmp_path):
    """The key ends at the first dot; what follows is the member's name, as webdataset has it."""
    rows = [("d.0/a.b.jpg", formats.jpeg(0)), ("d.0/a.seg.png", b"seg"), ("d.0/a.jpg", b"plain"),
            ("d.0/a.long.txt", b"long"), ("d.0/a.txt", b"short"), ("d.0/a.CLS", b"7")]  # fmt: skip
    data = archive(rows)
    record = opened(tmp_path, data)[0]
    assert record["key"] == "d.0/a" and record["image"] == b"plain" and record["label"] == 7
    assert [c["text"] for c in record["captions"]] == ["short"]
    given = fields.Fields(image="seg.png", captions=("long.txt", "txt"))
    record = opened(tmp_path, data, given=given)[0]
    assert record["image"] == b"seg"
    assert [(c["text"], c["source"]) for c in record["captions"]] == [
        ("long", "long.txt"),
        ("short", "txt"),
    ]
    for given, message in (
        (fields.Fields(image="mask.png"), r"no sample with mask.png .*members: .*'b.jpg'"),
        (fields.Fields(captions=("caption.txt",)), r"no sample .* one of \['caption.txt'\]"),
    ):
        with pytest.raises(check.UserError, match=message):
            opened(tmp_path, data, given=given)


def test_file_names_with_dots(tmp_path):
    rows = [("a.v2.JPG", formats.jpeg(0)), ("a.v2.txt", b"one"), ("b.1.jpg", b"1"),
            ("b.2.jpg", b"2"), ("b.txt", b"two pictures")]  # fmt: skip
    source = opened(tmp_path, archive(rows))
    assert keys(source) == ["a"] and source.counts == {"no_text": 2}
    assert source[0]["captions"][0]["text"] == "one"
    rows = [m for k in ("1.jpg", "1.txt", "2.jpg", "2.txt") for m in [(f"a.2024.{k}", b"x")]]
    assert keys(opened(tmp_path, archive(rows), strict=True)) == ["a.2024.1", "a.2024.2"]


def test_every_ending_in_any_case(tmp_path):
    endings = ("JPG", "Jpeg", "PNG", "WebP", "TIFF", "bmp", "GIF", "jp2", "avif", "pgm", "jfif")
    rows = [m for e in endings for m in ((f"{e}.{e}", b"image"), (f"{e}.TXT", b"x"))]
    source = opened(tmp_path, archive(rows), strict=True)
    assert keys(source) == list(endings) and source[0]["image"] == b"image"
    assert source[3]["captions"][0]["text"] == "x"


def test_classes_without_captions_are_samples(tmp_path):
    rows = [m for i in range(4) for m in ((f"{i}.cls", b"%d" % (i % 2)), (f"{i}.jpg", b"x"))]
    source = opened(tmp_path, archive(rows), strict=True)
    got = [(r["label"], r["captions"]) for r in (source[i] for i in range(4))]
    assert got == [(0, []), (1, []), (0, []), (1, [])]
    source = opened(tmp_path, archive(rows), given=fields.Fields(captions=("cls",)))
    assert [source[i]["captions"][0]["text"] for i in range(4)] == ["0", "1", "0", "1"]


def test_texts_that_are_no_utf8_are_bad_rows(tmp_path):
    rows = [("a.jpg", formats.jpeg(0)), ("a.txt", b"caf\xe9"), *pair("b"),
            ("c.jpg", formats.jpeg(0)), ("c.json", b'{"caption": "x'), *pair("d")]  # fmt: skip
    source = opened(tmp_path, archive(rows))
    for i in (0, 2):
        with pytest.raises(ValueError):
            source[i]
    out = tmp_path / "out"
    manifest = convert.run(convert.Job(str(tmp_path / "a.tar"), str(out)))
    assert manifest["info"]["left_out"] == {"bad row": 2}
    kept = records.open_split(out, "train")
    assert keys(kept) == ["b", "d"]


def test_repeated_members_begin_another_sample(tmp_path):
    rows = [*pair("a", 1), *pair("a", 2), ("b.jpg", b"x"), ("b.JPG", b"y"), ("b.txt", b"z")]
    source = opened(tmp_path, archive(rows))
    assert keys(source) == ["a", "a", "b"] and source.counts == {"no_text": 1}
    assert source[0]["image"] != source[1]["image"] and source[2]["image"] == b"y"


def test_compressed_tars_are_named(tmp_path):
    import bz2
    import gzip
    import lzma

    data = archive(pair("a"))
    for name, pack in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        with pytest.raises(check.UserError, match=rf"a\.tar: got {name} data, .*; unpack it"):
            opened(tmp_path, pack(data))


def test_convert_reads_a_joined_archive_of_a_mac(tmp_path, capsys):
    rows = [("./._" + n[2:], DOUBLE) for n in ("./a.jpg", "./b.txt")]
    data = archive([rows[0], *pair("./a")]) + archive([*pair("./b"), rows[1]])
    (tmp_path / "a.tar").write_bytes(data)
    for strict in ((), ("--strict",)):
        out = tmp_path / f"out{len(strict)}"
        assert test_cli_data.run("convert", tmp_path / "a.tar", "--out", out, *strict) == 0
        assert keys(records.open_split(out, "train")) == ["./a", "./b"]
    assert "'sidecar': 2" in capsys.readouterr().out


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_json_nested_too_deep_is_a_bad_row(tmp_path, depth, capsys):
    """2000 deep: the parser takes it, what walks it would not."""
    deep = b'{"caption": ' + b"[" * depth + b"]" * depth + b"}"
    rows = [*pair("a"), ("b.jpg", formats.jpeg(1)), ("b.json", deep), *pair("c", 2)]
    (tmp_path / "a.tar").write_bytes(archive(rows))
    with pytest.raises(ValueError, match=r"b\.json: JSON nested too deep"):
        sources.open_path(tmp_path / "a.tar")[1]
    flags = {
        "convert": ("--out", tmp_path / "o"),
        "inspect": (),
        "filter": ("--out", tmp_path / "f", "--min-side-px", 0, "--min-words", 1),
        "tokenizer": ("--out", tmp_path / "t", "--vocab-size", 30),
        "bench": ("--num-images", 3, "--batch", 2, "--image-px", 16),
    }
    for command, more in flags.items():
        assert test_cli_data.run(command, tmp_path / "a.tar", *more) == 0, command
    assert records.read_manifest(tmp_path / "o")["info"]["left_out"] == {"bad row": 1}


def test_parts_that_do_not_fit_are_counted(tmp_path):
    """As in a folder: a caption, a label, a language and a key that was guessed."""
    meta = b'{"caption": ["b", 7], "label": 1.5, "lang": 5}'
    data = archive([("a.jpg", formats.jpeg(0)), ("a.json", meta), *pair("c", 2)])
    source = opened(tmp_path, data)
    record, notes = source.read(0)
    assert [c["text"] for c in record["captions"]] == ["b"] and record == source[0]
    assert sorted(part for part, _ in notes.parts) == ["caption", "label", "lang"]
    convert.run(convert.Job(str(tmp_path / "a.tar"), str(tmp_path / "o")))
    info = records.read_manifest(tmp_path / "o")["info"]
    assert info["parts_left_out"] == {"caption": 1, "label": 1, "lang": 1}


@pytest.mark.parametrize(
    "stats",
    ["[]", "{", "[" * 100_000, '{"status_dict": null}', '{"status_dict": []}',
     '{"status_dict": {"success": "x"}}', '{"status_dict": {"success": 1.5}}'],
    ids=range(7),
)  # fmt: skip
def test_broken_stats_of_img2dataset_count_as_an_unfinished_shard(tmp_path, stats):
    opened(tmp_path, archive(pair("a")))
    (tmp_path / "a_stats.json").write_text(stats)
    convert.run(convert.Job(str(tmp_path / "a.tar"), str(tmp_path / "o")))
    info = records.read_manifest(tmp_path / "o")["info"]
    assert info["img2dataset"] == {"train": {"unfinished_shards": 1}}
