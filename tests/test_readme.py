"""Every block of the README and of docs/*.md does what it shows, in a fresh directory, heading by heading.

Commands run as they stand but for `INSTEAD`, which makes long ones short, and `BUILT`, which are planned, not trained;
`make`, `pip` and scripts are compared with the Makefile, setup.py and the tree; `ELSEWHERE` cannot run here and are
skipped by name, with the reason; so are `SLOW`, unless VLP_SLOW=1. An entry that no block needs fails.
"""

import ast
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from typing import Any, ClassVar

import ml_collections
import numpy as np
import pytest
from PIL import Image

from helpers import runs
from vlp.core.types import Ctx, Out, Term
from vlp.data import records, tokenizer
from vlp.losses import caption
from vlp.train import stages

ROOT = runs.ROOT
PAGES = ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))

SMALLER = "smaller towers and two epochs: seconds, not minutes"
SHORT = "smoke: two steps on made-up shapes, not the minutes of the demo"
TINY = " ".join(  # of the demo's config: its data, splits and evaluations stay
    f"--config.{key}={value}"
    for key, value in {
        **{f"model.{t}.depth": 1 for t in ("image_tower", "text_tower", "decoder")},
        **{f"model.{t}.width": 16 for t in ("image_tower", "text_tower")},
        **{"model.poolers.queries": 2, "model.embed": 16, "data.image_px": 16, "batch": 16},
        **{f"evals.{e}.batch": 16 for e in ("retrieval", "validation", "skin_tone", "captions")},
        "stages": """'({"name":"masked","steps":2},{"name":"unmasked","steps":1,"objective":{"keep_ratio":1.0}})'""",
    }.items()
)
INSTEAD = {  # part of a command → what stands for it here, and why
    "small.py:path=data/mine --workdir": (
        "small.py:path=data/mine,px=16,epochs=2 --config.model.image_tower.depth=1"
        " --config.model.text_tower.depth=1 --config.model.decoder.depth=1 --workdir",
        SMALLER,
    ),
    "coca_emoji.py --workdir runs/seen": ("coca_emoji.py:smoke --workdir runs/seen", SHORT),
    "coca_emoji.py --workdir runs/coca_emoji": (
        f"coca_emoji.py {TINY} --workdir runs/coca_emoji",
        SMALLER,
    ),
    "coca_emoji.py:seed=1": (f"coca_emoji.py:seed=1 {TINY}", SMALLER),
    "--profile 20:25": ("--profile 1:2", "a smoke run has two steps"),
    "vlp data bench data/mine": (
        "vlp data bench data/mine --num-images 20 --batch 4 --image-px 32",
        "20 images",
    ),
    "--out data/emoji ": ("--out data/emoji --image-px 16 ", "small pictures: seconds"),
}
SLOW = {  # part of a command → why it needs VLP_SLOW=1
    "vlp data emoji": "draws 3,953 pictures",
    "--profile 20:25": "tests/train/test_sinks.py profiles another run",
    "--processes 2": "two processes that compile for themselves",
    "--devices 8": "compiles B/16 for eight devices",
}
ELSEWHERE = {  # part of a command → why it cannot run here
    "--workdir gs://": "needs a bucket; tests/runtime/test_buckets.py",
    "--config.init=runs/b32": "trains from weights of others; tests/exchange/test_folders.py does",
    "vlp ckpt import ViT-B-32-laion2b/": "needs weights of others; tests/exchange makes some",
    "--workdir runs/b32": "the same",
    "--workdir runs/coca photo.jpg": "the same",
    "vlp ckpt export runs/tuned": "the same",
    "img2dataset --url_list": "needs the network, and an environment of its own",
    "--topology v5e:16x16": "needs the TPU compiler (libtpu); tests/train/test_plan.py where it is",
}
BUILT = {  # part of a command → why its config is only built here, for its devices and data
    "configs/clip.py:size=B/32,path=data/mine": "trains 150 M parameters",
    "configs/albef.py:path=data/mine": "trains 210 M parameters",
    "configs/coca.py:size=base,smoke": "tests/test_configs.py runs it",
}
FAILS = {"--gpu H100:8": 1, "weight_decy": 2}  # part of a command → its exit code, as the page says


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    heading: str
    language: str
    text: str

    def commands(self) -> list[str]:
        """Lines without comments, continued ones joined; a loop of the shell is one."""
        text = self.text.replace("\\\n", " ")
        found, loop = [], ""
        for line in text.splitlines():
            line = loop + re.sub(r"\s\s+#.*|^#.*", "", line).rstrip()
            loop = f"{line}\n" if line.startswith("for ") and "done" not in line else ""
            if line and not loop:
                found.append(" ".join(line.split()) if "\n" not in line else line)
        return found


def blocks(page):
    heading, found, lines = "", [], (ROOT / page).read_text().splitlines()
    lines = iter(lines)
    for line in lines:
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        if line.startswith("```"):
            body = []
            for inner in lines:
                if inner.startswith("```"):
                    break
                body.append(inner)
            found.append(Block(page, heading, line.strip("`"), "\n".join(body)))
    return found


ALL = [block for page in PAGES for block in blocks(page)]
SECTIONS = list(dict.fromkeys((b.page, b.heading) for b in ALL))
COMMANDS = [c for b in ALL if b.language == "bash" for c in b.commands()]


def photographs(num):
    """photos/ of squares with their captions beside them, and photos.csv."""
    os.mkdir("photos")
    lines, colours = ["image_path,caption"], ("red", "green", "blue")
    for k in range(num):
        pixels = np.random.default_rng(k).integers(0, 90, (210, 220, 3), dtype=np.uint8)
        pixels[40:170, 40:170, k % 3] = 250
        Image.fromarray(pixels).save(f"photos/{k}.jpg")
        text = f"a {colours[k % 3]} square, the {k // 3}th of its kind"
        pathlib.Path("photos", f"{k}.txt").write_text(text)
        lines.append(f'photos/{k}.jpg,"{text}"')
    pathlib.Path("photos.csv").write_text("\n".join(lines) + "\n")


def shards():
    """What img2dataset leaves in shards/, with the column `id` that was kept."""
    os.mkdir("shards")
    with tarfile.open("shards/00000.tar", "w") as archive:
        for k in range(4):
            out = io.BytesIO()
            Image.new("RGB", (9, 9), (60 * k, 9, 9)).save(out, "JPEG")
            row = {"id": f"mine{k}", "caption": f"no {k}", "status": "success"}
            parts = {"jpg": out.getvalue(), "json": json.dumps(row).encode(), "txt": b"a b"}
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{k:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def emoji():
    """data/emoji in small: the demo's splits and fields, skin tones where the demo has them, coloured squares."""
    tones = ("none", "light", "medium-light", "medium", "medium-dark", "dark")

    def rows(split, num, tones=tones[:1]):
        for k in range(num):
            out = io.BytesIO()
            Image.new("RGB", (16, 16), (250 - 9 * k, 9 * k, len(split))).save(out, "PNG")
            text = {"text": f"{split} person {k}", "source": "unicode", "lang": "en"}
            row = {"key": f"{split}{k}", "base": f"{split}{k}", "primary": True}
            yield row | {"image": out.getvalue(), "captions": [text], "tone": tones[k % len(tones)]}

    words = tokenizer.train([r["captions"][0]["text"] for r in rows("train", 24)], vocab_size=100)
    splits = {"train": rows("train", 24, tones), "val": rows("val", 8), "test": rows("test", 8)}
    splits |= {f"{s}_variants": rows(f"{s}_variants", 12, tones) for s in ("val", "test")}
    files = {records.TOKENIZER: words.to_bytes()}
    records.write("data/emoji", splits, name="emoji", info={}, files=files)


def prepare(page, heading):
    """Makes the files that a section assumes: the reader's own, and the repository's."""
    os.symlink(ROOT / "configs", "configs")
    if page == "docs/data.md" or heading == "Your own images":
        photographs(24)
        shards()
    if heading == "Tokenizers":  # a section further up made it
        assert runs.vlp("data", "convert", "photos.csv", "--out", "data/english") == 0
    if heading == "A first tour":
        Image.new("RGB", (50, 40), (200, 30, 30)).save("my.png")
        if not os.environ.get("VLP_SLOW"):  # the section's first command draws them
            emoji()


def shortened(command):
    for old, (new, _) in INSTEAD.items():
        if old in f"{command} ":
            command = f"{command} ".replace(old, new).strip()
    return command


def why_not(command):
    """The reason not to run a command with the others, "" if there is none."""
    tables = (SLOW if not os.environ.get("VLP_SLOW") else {}) | ELSEWHERE
    return next((reason for part, reason in tables.items() if part in command), "")


def is_checked(command):
    return command.split()[0] in ("make", "pip", "python3", "python")


def run(command):
    """Runs one command; `vlp` in this process, what is the shell's in one. Returns its output."""
    code = next((c for part, c in FAILS.items() if part in command), 0)
    command = shortened(command)
    if command.startswith("for "):
        (bin_ := pathlib.Path("bin")).mkdir()
        (bin_ / "vlp").write_text(f'#!/bin/sh\nexec {sys.executable} -m vlp "$@"\n')
        (bin_ / "vlp").chmod(0o755)
        path = f"{bin_.absolute()}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "done: " in done.stdout, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    words = shlex.split(command)
    assert words[0] == "vlp", f"{command}: neither run nor checked"
    if any(part in command for part in BUILT):
        words[1:2], at = ["plan"], words.index("--workdir")
        del words[at : at + 2]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        got = runs.vlp(*words[1:])
    assert got == code, f"{command}\nexit code {got}\n{out.getvalue()}\n{error.getvalue()}"
    return out.getvalue() + error.getvalue()


@pytest.mark.parametrize(("page", "heading"), SECTIONS)
def test_every_block_of_a_section(page, heading, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    prepare(page, heading)
    if heading == "Parameters in one call":
        shutil.copytree(request.getfixturevalue("clip_run"), "runs/coca_emoji")
    for block in (b for b in ALL if (b.page, b.heading) == (page, heading)):
        if block.language == "bash":
            for command in block.commands():
                if not is_checked(command) and not why_not(command):
                    run(command)
        elif block.language == "python":
            python(block)
        elif block.language == "console":
            console(block)
        else:
            tree(block)
    given = {"cache", "bin", "configs", "photos", "photos.csv", "shards", "my.png", "data", "runs"}
    shown = "".join(b.text for b in ALL if (b.page, b.heading) == (page, heading))
    made = {p.name for p in tmp_path.iterdir()} - given
    assert all(name in shown for name in made), f"{made}: files that no block names"


@pytest.mark.parametrize("command", [c for c in COMMANDS if why_not(c)])
def test_what_is_not_run_here(command):
    """Skips, and names, what the test above leaves out."""
    pytest.skip(f"{why_not(command)}{' (VLP_SLOW=1 runs it)' * any(p in command for p in SLOW)}")


def test_no_entry_of_a_table_is_left_over():
    text = "\n".join(f"{c} " for b in ALL for c in b.commands())
    for part in (*INSTEAD, *SLOW, *BUILT, *ELSEWHERE, *FAILS):
        assert part in text, f"{part!r} is in no block"


def test_what_is_installed_and_made_exists():
    """`pip install` lines name extras of setup.py, `make` lines targets of the Makefile, scripts are there."""
    setup = ast.parse((ROOT / "setup.py").read_text())
    (extras,) = [n.value for n in setup.body if isinstance(n, ast.Assign) and _name(n) == "extras"]
    names = {k.value for k in extras.keys} | {"dev"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    for found in re.findall(r"(?:vlp|\.)\[([\w,]+)\]", pages):
        assert set(found.split(",")) <= names, found
    for found in re.findall(r"(?:`|^)make (\w+)", pages, re.M):
        assert found in targets, found
    for found in re.findall(r"\b(?:benchmarks|configs|docs|tests|vlp)/[\w/]+\.\w+", pages):
        assert (ROOT / found).is_file(), found
    for page in PAGES:
        for found in re.findall(r"\]\((?!http)([\w/.]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(found).exists(), f"{page}: {found}"
    checked = [c for c in COMMANDS if is_checked(c)]
    assert {"make", "pip", "python3"} <= {c.split()[0] for c in checked}


def _name(assign):
    (target,) = assign.targets
    return getattr(target, "id", "")


def python(block):
    """Runs a block with the names that it assumes."""
    given = {"dataclasses": dataclasses, "Ctx": Ctx, "Out": Out, "Term": Term, "caption": caption}
    given |= {"ClassVar": ClassVar, "Any": Any}
    given["c"] = config = ml_collections.ConfigDict()
    exec(compile(block.text, f"{block.page}: {block.heading}", "exec"), given)
    if block.heading == "Add a method":
        same_but_for_a_metric(block.text)
    if config:
        whole = runs.changed(runs.COCA, **config.to_dict())
        names = [s.name for s in stages.parse(whole)[1]]
        if "stages" in config:
            assert names == [s["name"] for s in config.stages]


def same_but_for_a_metric(text):
    """The README's Cap is vlp/objectives/cap.py without docstring and metric."""
    real = ast.parse((ROOT / "vlp/objectives/cap.py").read_text())
    (real,) = [n for n in real.body if isinstance(n, ast.ClassDef)]
    (shown,) = ast.parse(text).body
    del real.body[0]
    call = next(n for n in real.body if isinstance(n, ast.FunctionDef) and n.name == "__call__")
    call.body = [n for n in call.body if "accuracy" not in ast.unparse(n).split("=")[0]]
    call.body[-1].value.keywords = []
    assert ast.unparse(shown) == ast.unparse(real)


def console(block):
    """A console shows the command's real output; a line without a command is an example of a message."""
    command, _, shown = block.text.partition("\n")
    if not command.startswith("$ "):
        source = "".join(p.read_text() for p in (ROOT / "vlp").rglob("*.py"))
        pieces = re.split(r"\d+ of \d+|\d+|'[^']*'|\(here[^)]*\)|: |, |; ", block.text)
        words = [p.strip() for p in pieces if len(p.strip()) > 14]
        assert words and all(w in source for w in words), [w for w in words if w not in source]
        return
    assert run(command.removeprefix("$ ")).strip() == shown.strip()


def tree(block):
    """The map of the house names folders that are there, and all of them."""
    folders = set(re.findall(r"\bvlp/(\w+)", block.text))
    there = {p.name for p in (ROOT / "vlp").iterdir() if p.is_dir() and p.name[0] not in "_."}
    assert folders == there
