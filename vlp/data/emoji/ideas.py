"""Which emoji are forms of one idea: a base emoji joins all skin tones, genders, hair and walking directions.

Splits are made by base, so validation and test ask for ideas that training never showed. Flags stay in training: a
flag cannot be guessed.
"""

import hashlib
from collections.abc import Container, Iterable

NUM_HELD_OUT = 200  # bases in each of val and test
VS16, ZWJ, RIGHT_ARROW = 0xFE0F, 0x200D, 0x27A1
SKIN = frozenset(range(0x1F3FB, 0x1F400))
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # 1F3FB … 1F3FF
GENDER_SIGNS = frozenset({0x2640, 0x2642})
HAIR = frozenset(range(0x1F9B0, 0x1F9B4))
NEUTRAL = {
    0x1F468: 0x1F9D1,
    0x1F469: 0x1F9D1,  # man, woman → adult
    0x1F466: 0x1F9D2,
    0x1F467: 0x1F9D2,  # boy, girl → child
    0x1F474: 0x1F9D3,
    0x1F475: 0x1F9D3,  # old man, old woman → older adult
}
# Forms that Unicode encodes apart but that are one idea; keys as the rules above leave them.
SAME_IDEA = {
    "1F471": "1F9D1",  # blond hair → adult, as the other hair colours
    "1F9D4": "1F9D1",  # beard → adult
    "1F385": "1F9D1-200D-1F384",  # Santa, Mrs and Mx Claus
    "1F936": "1F9D1-200D-1F384",
    "1F934": "1FAC5",  # prince, princess, person with crown
    "1F478": "1FAC5",
    "1F930": "1FAC4",  # pregnant woman, man, person
    "1FAC3": "1FAC4",
    "1F57A": "1F483",  # man, woman dancing
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",  # holding hands
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F9D1-200D-2764-200D-1F9D1": "1F491",  # couple with heart
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",  # kiss
    "1F9D1-200D-1F430-200D-1F9D1": "1F46F",  # people with bunny ears
    "1F9D1-200D-1FAEF-200D-1F9D1": "1F93C",  # wrestlers
    "1FAF1-200D-1FAF2": "1F91D",  # handshake of two skin tones
    **{
        "-".join(["1F9D1"] * adults + ["1F9D2"] * children).replace("-", "-200D-"): "1F46A"
        for adults in (1, 2)
        for children in (1, 2)
    },  # every family
}


def base_of(key: str) -> str:
    """Returns the base emoji of a key such as "1F469-1F3FD-200D-1F680" (→ "1F9D1-200D-1F680")."""
    points = [int(p, 16) for p in key.split("-")]
    if set(points) <= SKIN:
        return "1F3FB"  # the five colour swatches are one idea
    points = [NEUTRAL.get(p, p) for p in points if p != VS16 and p not in SKIN]
    kept = []
    for p in points:
        if kept and kept[-1] == ZWJ and (p in GENDER_SIGNS or p in HAIR or p == RIGHT_ARROW):
            kept.pop()  # the joiner goes with what it joined
        else:
            kept.append(p)
    base = "-".join(f"{p:04X}" for p in kept)
    return SAME_IDEA.get(base, base)


def tone_of(key: str, keys: Container[str]) -> str:
    """Returns the skin tone of an emoji: one of TONES; "none" without one, if `keys` has its toned forms.

    "" for all others: what has no skin, persons of several tones, the colour swatches.
    """
    points = key.split("-")
    tones = {int(p, 16) for p in points} & SKIN
    if len(tones) > 1 or tones >= {int(p, 16) for p in points}:
        return ""
    if tones:
        return TONES[min(tones) - min(SKIN)]
    light = f"{min(SKIN):04X}"
    forms = ("-".join([*points[:i], light, *points[i:]]) for i in range(1, len(points) + 1))
    return "none" if any(form in keys for form in forms) else ""


def is_flag(key: str) -> bool:
    """True for regional indicators and for what starts with the white or the black flag."""
    first = int(key.split("-")[0], 16)
    return 0x1F1E6 <= first <= 0x1F1FF or first in (0x1F3F3, 0x1F3F4)


def assign_splits(bases: Iterable[str]) -> dict[str, str]:
    """Returns base → "train" | "val" | "test": in hash order, so new emoji move few old ones."""
    free = sorted(
        {b for b in bases if not is_flag(b)}, key=lambda b: hashlib.sha256(b.encode()).digest()
    )
    held = {b: "test" for b in free[:NUM_HELD_OUT]}
    held |= {b: "val" for b in free[NUM_HELD_OUT : 2 * NUM_HELD_OUT]}
    return {b: held.get(b, "train") for b in bases}
