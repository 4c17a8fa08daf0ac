"""The command line against nonsense: exit code 0, 2 or 1, mistakes in one line, nothing written out of place.

60 command lines; with VLP_SLOW=1 2,000, also with real training of what is small enough.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shlex
import signal

import numpy as np
import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlp.cli import main as cli
from vlp.core.config import plain
from vlp.data import records, tokenizer
from vlp.train import loop, stages

SLOW = bool(os.environ.get("VLP_SLOW"))
NUM = int(os.environ.get("VLP_FUZZ", 2000 if SLOW else 60))
LIMIT_SECS = 60
NUMBERS = [
    "-1", "0", "1", "2", "3", "7", "2147483647", "2147483648", "9223372036854775808", str(10**30), "-" + "9" * 30,
    "nan", "inf", "-inf", "-0.0", "0.5", "1.5", "1e-320", "1e308", "1e309", "-1e308", "0x10", "1_000", "1e3",
]  # fmt: skip
WORDS = [
    "", " ", "None", "True", "false", "a", "train", "test", "val", "clip", "ema", "float16", "full", "mean", "é", "図",
    "a\tb", "a\nb", "\x01", "../x", "x/../..", "~", ".", "%s", "{}", "{0}", "(", "*", "a" * 300, "\ud800", "-", "--",
]  # fmt: skip
LITERALS = [
    "[]", "()", "{}", "[1]", "[None]", "(1, 2)", "('a',)", "[[]]", "{'a': 1}", "{1: 2}", "{'name': 'clip'}", "[{}]",
    "{'name': None}", "[1, 'a']", "((((", "{'a': {'b': []}}", "b'x'", "1j", "...", "float('nan')", "[nan]", "{1, 2}",
    "(1e309,)", "[0.5, 0.5, 0.5]", "[0.7, 0.30000000000000004]",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(LITERALS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=8).filter(lambda s: "\0" not in s),
)
FULL = runs.changed(
    runs.COCA,
    **{
        "streams": {"more": {"batch": 8, "data": runs.DATA}},
        "teachers.path": {},
        "evals.zeroshot": {"label": "shape", "classes": ["circle", "square"], "batch": 8},
        "data.mixture": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}],
        "mesh": {"data": 1},
    },
)


def paths(config):
    """Every place of a config, sections and leaves, with the defaults that the file does not name."""
    run, built = stages.parse(config)
    whole = {**plain(built[0]), **plain(run)}
    for key in ("model", "objective", "optim"):  # plain() of these has no names
        whole[key] = {"name": "", **whole[key]}
    for key in ("index", "start_step", "start_samples"):
        whole.pop(key)
    whole["stages"] = config.get("stages", [])

    def walk(node, path):
        yield path
        items = enumerate(node) if isinstance(node, list) else dict(node).items()
        for key, value in items if isinstance(node, list | dict) else ():
            inner = f"{path}.{key}" if path else str(key)
            yield from walk(value, inner) if isinstance(value, list | dict) else [inner]

    found = [p for p in walk(whole, "") if p]
    sections = sorted({p.rpartition(".")[0] for p in found})
    return found + [f"{s}.unknown" if s else "unknown" for s in sections]


CONFIGS = {"toy": runs.TOY, "clip": runs.CLIP, "full": FULL}


@functools.cache
def places(name):
    return paths(CONFIGS[name])


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A run, two datasets, images and config files, which commands are pointed at."""
    from vlp.models import MODELS
    from vlp.objectives import OBJECTIVES

    folder = tmp_path_factory.mktemp("fuzz") / "inputs"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "toy", runs.Toy)
        patch.setitem(OBJECTIVES, "toy", runs.ToyObjective)
        patch.setattr(runs, "MEMORY", {})
        evals = {"retrieval": {"batch": 8}}
        assert runs.train(runs.changed(runs.TOY, steps=2, evals=evals), folder / "run") == 0
        for name, config in CONFIGS.items():
            (folder / f"{name}.json").write_text(json.dumps(config))
        Image.new("RGB", (20, 30)).save(folder / "a.png")
        (folder / "text.txt").write_text("no image")
        _dataset(folder / "data")
        photos = folder / "photos"
        photos.mkdir()
        for i in range(4):
            Image.new("RGB", (20, 30), (i, 50, 9 * i)).save(photos / f"{i}.png")
            (photos / f"{i}.txt").write_text(f"a caption number {i}")
        (folder / "table.csv").write_text("image,caption\nphotos/0.png,one\nphotos/1.png,two\n")
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield folder


def _dataset(folder):
    words = tokenizer.train([f"number {i}" for i in range(30)], vocab_size=64)
    rng = np.random.default_rng(0)

    def rows(num):
        for i in range(num):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(image, "PNG")
            caption = {"text": f"number {i}", "source": "alt", "lang": "en"}
            yield {"key": str(i), "image": image.getvalue(), "captions": [caption]}

    files = {"tokenizer.model": words.to_bytes()}
    records.write(str(folder), {"train": rows(9), "val": rows(8)}, name="d", info={}, files=files)


GOOD = {  # values that mean something, by option
    "config": ["@toy.json", "@clip.json", "@full.json"],
    "workdir": ["@run", "%new", "%new"],
    "models": ["@run", "@run@2"],
    "workdirs": ["@run"],
    "images": ["@a.png", "@text.txt"],
    "input": ["@photos", "@table.csv", "@data"],
    "dir": ["@data"],
    "data": ["@data", "@photos"],
    "evals": ["retrieval"],
    "json": ["%a.json"],
    "html": ["%a.html"],
    "quarantine": ["%q.jsonl"],
    "out": ["%out"],
    "splits": ["train", "val"],
}


OUTPUTS = ("--out", "--json", "--html", "--quarantine")


@st.composite
def command_lines(draw):
    """Arguments of one command; "@NAME" stands for a file of the sandbox, "%NAME" for one to be written."""
    argv = draw(st.sampled_from(sorted(_parsers())))
    parser = _parsers()[argv]
    out = argv.split()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        usual = not action.option_strings or action.required
        if draw(st.integers(0, 9)) >= (9 if usual else 2):
            continue
        out += draw(_option(action))
    if argv in ("train", "plan", "eval"):
        names = [a for a in out if a.startswith("@")]
        config = next((n[1:-5] for n in names if n.endswith(".json")), "full")
        for _ in range(draw(st.integers(0 if argv != "train" else 1, 2))):
            place = draw(st.sampled_from(places(config)))
            out.append(f"--config.{place}={draw(VALUES)}")
    return out


def _option(action):
    flag = action.option_strings[-1:]
    if action.nargs == 0:
        return st.just(flag)
    good = GOOD.get(action.dest, [str(c) for c in action.choices or ["1", "2", "a"]])
    if action.dest in (
        "devices",
        "gpu",
        "topology",
        "slices",
    ):  # start JAX anew, in a process of its own
        return st.just([])
    value = st.one_of(st.sampled_from(good), st.sampled_from(good), VALUES)
    if action.dest in ("config", "workdir"):
        value = st.sampled_from([*good, *good, *good, "@none", "", "@a.png"])
    many = 2 if action.nargs in ("+", "*") else 1
    glue = lambda values: [f"{flag[0]}={values[0]}"] if flag and many == 1 else [*flag, *values]
    return st.lists(value, min_size=1, max_size=many).map(glue)


@functools.cache
def _parsers():
    """The parser of every command, by its words."""
    import importlib

    parser = cli.Parser(prog="vlp")
    subparsers = parser.add_subparsers()
    found = {}
    for name in cli.COMMANDS:
        importlib.import_module(f"vlp.cli.{name}").add_parser(subparsers)
        sub = subparsers.choices[name]
        inner = [a for a in sub._actions if isinstance(a, argparse._SubParsersAction)]
        found |= {f"{name} {k}": p for a in inner for k, p in a.choices.items()} or {name: sub}
    del found["data emoji"]  # draws thousands of images
    return found


class Reached(Exception):
    """Training would begin."""


@dataclasses.dataclass
class Answer:
    code: int
    err: str
    reached: bool


def execute(argv, sandbox, training):
    """Runs a command in this process; fails the test if it hangs."""

    def stop(*args):
        raise TimeoutError(f"more than {LIMIT_SECS} s")

    def session(config, settings, *args):
        size = [
            s.num_steps > 4 or s.batch > 32 or s.data.image_px > 32 or s.data.text_len > 32
            for s in stages.parse(config)[1]
        ]
        if training and not any(size) and config["model"].get("name") == "toy":
            return real(config, settings, *args)
        raise Reached

    real = loop.open_session
    err, reached = io.StringIO(), False
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECS)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            patch.setattr(loop, "open_session", session)
            patch.setattr(runs, "MEMORY", {})
            code = runs.vlp(*argv)
    except Reached:
        code, reached = 0, True
    except SystemExit as e:  # --help
        code = e.code
    finally:
        signal.alarm(0)
    return Answer(code, err.getvalue(), reached)


def listing(folder):
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in folder.rglob("*")
    }


def check_one(argv, sandbox, training=False):
    import shutil
    import tempfile

    new = pathlib.Path(tempfile.mkdtemp(dir=sandbox.parent, prefix="new"))
    put = lambda a: a.replace("=%", f"={new}/").replace("=@", f"={sandbox}/")
    config = lambda a: (
        f"{pathlib.Path(runs.__file__)}:{a}" if a.endswith(".json") and str(sandbox) in a else a
    )
    real = []
    for a in argv:
        a = (
            f"{new}/{a[1:]}"
            if a.startswith("%")
            else f"{sandbox}/{a[1:]}"
            if a.startswith("@")
            else put(a)
        )
        if a.startswith("--config="):
            a = f"--config={config(a.removeprefix('--config='))}"
        real.append(a)
    before = listing(sandbox), listing(pathlib.Path.cwd())
    shown = shlex.join(argv)
    try:
        answer = execute(real, sandbox, training)
    except (Exception, KeyboardInterrupt) as e:
        raise AssertionError(f"vlp {shown}") from e
    lines = answer.err.splitlines()
    assert answer.code in (0, 1, 2), (shown, answer)
    if answer.code == 2:
        assert len(lines) == 1 and lines[0].startswith("vlp: "), (shown, answer)
    told = [line for line in lines if " … " not in line]
    if answer.code == 1 and not any(w in argv for w in ("plan", "verify")):
        assert len(told) == 1, (shown, answer)
    assert "Traceback" not in answer.err, shown
    target = {a.partition("=")[2] or a for a in real}
    for folder, was in zip((sandbox, pathlib.Path.cwd()), before):
        for path, value in listing(folder).items():
            named = any(
                t and os.path.abspath(t) in (path, *map(str, pathlib.Path(path).parents))
                for t in target
            )
            named = named or (argv[0] == "report" and path.endswith(".html"))  # there by default
            assert was.get(path) == value or named, f"vlp {shown} wrote {path}"
    if answer.reached or "plan" in argv or "eval" in argv:
        outs = [a for a in real if a.partition("=")[0] in OUTPUTS]
        assert outs or not list(new.iterdir()), f"vlp {shown} wrote {list(new.iterdir())}"
    shutil.rmtree(new)


@pytest.mark.parametrize("seed", range(4 if SLOW else 1))
def test_any_command_line(sandbox, toy, seed):
    if SLOW and os.environ.get("VLP_FUZZ_SEED", str(seed)) != str(seed):
        pytest.skip("another part")

    @settings(
        max_examples=NUM // 4 if SLOW else NUM,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=None or settings.default.phases,
    )
    @given(argv=command_lines())
    def one(argv):
        check_one(argv, sandbox, training=SLOW)

    import hypothesis

    hypothesis.seed(seed)(one)()
