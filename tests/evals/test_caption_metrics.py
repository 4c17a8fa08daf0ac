"""Caption metrics: against pycocoevalcap's numbers, plain loops, and Java's tokenizer where they are installed."""

import collections
import itertools
import math
import random
import shutil

import pytest

from vlp.evals import caption_metrics as metrics

WORDS = "a the cat dog on in sits red mat big small runs near of with two".split()


def sets(seed, num=40):
    """Captions and one to five references each, as tokens; some equal, one empty."""
    rng = random.Random(seed)
    words = lambda most: [rng.choice(WORDS) for _ in range(rng.randint(1, most))]
    captions = [words(12) for _ in range(num)]
    captions[3] = []
    references = [[words(14) for _ in range(rng.randint(1, 5))] for _ in range(num)]
    for i in range(0, num, 7):
        references[i][0] = captions[i] or ["x"]
    return captions, references


def grams(tokens, n):
    return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def plain_bleu(captions, references, n):
    precision = 1.0
    for m in range(1, n + 1):
        right = guessed = 0
        for c, refs in zip(captions, references):
            for gram, num in grams(c, m).items():
                right += min(num, max(grams(r, m)[gram] for r in refs))
            guessed += max(0, len(c) - m + 1)
        precision *= right / guessed
    closest = [
        min(refs, key=lambda r, c=c: (abs(len(r) - len(c)), len(r)))
        for c, refs in zip(captions, references)
    ]
    ratio = sum(map(len, captions)) / sum(map(len, closest))
    return precision ** (1 / n) * min(1.0, math.exp(1 - 1 / ratio))


def plain_lcs(a, b):
    for n in range(min(len(a), len(b)), 0, -1):
        b_parts = set(itertools.combinations(b, n))
        if any(part in b_parts for part in itertools.combinations(a, n)):
            return n
    return 0


def plain_cider(captions, references):
    df = lambda gram: sum(any(gram in grams(r, len(gram)) for r in refs) for refs in references)
    weight = lambda gram: math.log(len(references)) - math.log(max(1, df(gram)))
    total = 0.0
    for c, refs in zip(captions, references):
        for r in refs:
            penalty = math.exp(-((len(c) - len(r)) ** 2) / 72) if c and r else None
            if penalty is None:
                penalty = math.exp(-((max(0, len(c) - 1) - max(0, len(r) - 1)) ** 2) / 72)
            for n in range(1, 5):
                a, b = ({g: k * weight(g) for g, k in grams(x, n).items()} for x in (c, r))
                product = sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items())
                norms = math.hypot(*a.values()) * math.hypot(*b.values())
                total += 10 * penalty * (product / norms if norms else product) / 4 / len(refs)
    return total / len(captions)


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_plain_loops(seed):
    captions, references = sets(seed, 12)
    for n, value in enumerate(metrics.bleu(captions, references), 1):
        assert value == pytest.approx(plain_bleu(captions, references, n), abs=1e-9)
    assert metrics.cider_d(captions, references) == pytest.approx(plain_cider(captions, references))
    short = [c[:8] for c in captions], [[r[:9] for r in refs] for refs in references]
    total = 0.0
    for c, refs in zip(*short):
        p = max((plain_lcs(c, r) / len(c) if c else 0) for r in refs)
        r = max(plain_lcs(c, r) / len(r) for r in refs)
        total += 2.44 * p * r / (r + 1.44 * p) if p and r else 0
    assert metrics.rouge_l(*short) == pytest.approx(total / 12)


def test_numbers_of_pycocoevalcap():
    """Recorded from pycocoevalcap 1.2, to 12 digits."""
    captions, references = sets(0)
    bleu = [0.585111820688, 0.347569773115, 0.279420982151, 0.247534352658]
    assert metrics.bleu(captions, references) == pytest.approx(bleu, abs=1e-11)
    assert metrics.rouge_l(captions, references) == pytest.approx(0.365465382580, abs=1e-11)
    assert metrics.cider_d(captions, references) == pytest.approx(1.075933366155, abs=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_an_installed_pycocoevalcap(seed, capsys):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    captions, references = sets(seed)
    said = {i: [" ".join(c)] for i, c in enumerate(captions)}
    refs = {i: [" ".join(r) for r in rs] for i, rs in enumerate(references)}
    expected = bleu.Bleu(4).compute_score(refs, said)[0]
    assert metrics.bleu(captions, references) == pytest.approx(expected, abs=1e-12)
    expected = rouge.Rouge().compute_score(refs, said)[0]
    assert metrics.rouge_l(captions, references) == pytest.approx(expected, abs=1e-12)
    expected = cider.Cider().compute_score(refs, said)[0]
    assert metrics.cider_d(captions, references) == pytest.approx(expected, abs=1e-12)


TOKENS = {  # as Java's tokenizer gives them
    "A cat's toy isn't here, (really)!": "a cat 's toy is n't here -lrb- really -rrb-",
    "Two dogs; one cat -- running...": "two dogs one cat running",
    "The U.S. flag at 12:30 p.m.": "the u.s. flag at 12:30 p.m.",
    "Mr. Smith & Mrs. Jones cannot go": "mr. smith & mrs. jones can not go",
    "1,000.50 people, 2nd place, 1/2 pie": "1,000.50 people 2nd place 1/2 pie",
    "She's gonna say \"hello\" to him.": "she 's gon na say hello to him",
    "$5 coffee, 50% off": "$ 5 coffee 50 % off",
    "a black/white close-up of a T-shirt": "a black/white close-up of a t-shirt",
    "rock 'n' roll at five o'clock": "rock 'n' roll at five o'clock",
    "an e-mail: foo@bar.com http://x.org/a": "an e-mail foo@bar.com http://x.org/a",
    "café con leche 😀": "café con leche",
    "“curly” — it’s 3-4 people?!": "curly it 's 3-4 people ?!",
    "he'll've gone; they've, I'm, we'd": "he 'll 've gone they 've i 'm we 'd",
}  # fmt: skip


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_of_the_treebank(text):
    assert " ".join(metrics.ptb(text)) == TOKENS[text]


def test_javas_metrics_where_they_are_installed(capsys):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    captions = ["a dog runs.", *list(TOKENS)[1:]]
    references = [[text, "a red mat"] for text in TOKENS]
    ours, java = metrics.score(captions, references), metrics.with_java(captions, references)
    for name in ("bleu_4", "rouge_l", "cider_d"):
        assert java[f"java/{name}"] == pytest.approx(ours[name], abs=1e-9)
    assert 0 < java["java/meteor"] < 1


def test_variety_and_length():
    captions = [["a", "dog"], ["a", "dog", "runs"], []]
    assert metrics.distinct(captions, 1) == 3 / 5
    assert metrics.distinct(captions, 2) == 2 / 3
    assert metrics.distinct(captions, 3) == 1
    assert metrics.distinct([[]], 1) == 0
    found = metrics.score(["A dog.", "A dog runs."], [["a dog"], ["a dog runs", "no"]])
    assert found["words"] == 2.5 and found["bleu_1"] == pytest.approx(1)
    assert found["rouge_l"] == pytest.approx(1)
