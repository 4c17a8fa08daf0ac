"""Pages of one HTML file, made from templates (Jinja2). Text from files can do no harm on them.

A package keeps its templates, styles and scripts in its folder `templates/`; those of vlp.core serve every package:
the frame `page.html.j2`, the parts of pages, the style. A value that a template prints is cut, its control characters
are made visible, and it is escaped, unless it is Markup. Python turns numbers into text; templates place text.
"""

import base64
import functools
import hashlib
from typing import Any

import jinja2
from markupsafe import Markup, escape

MAX_CHARS = 2_000  # of one text; the rest is cut

# Control characters become visible: C0 as control pictures (␛), the others by number. Characters that change the
# direction of text are among them: a file name with one can read as another name.
_VISIBLE: dict[int, str] = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"}
_VISIBLE |= {0x7F: "\N{SYMBOL FOR DELETE}"}
_VISIBLE |= {
    i: f"\N{MATHEMATICAL LEFT ANGLE BRACKET}{i:02X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    for i in (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}
_SURROGATES = {i: "\N{REPLACEMENT CHARACTER}" for i in range(0xD800, 0xE000)}  # in no encoding
_VISIBLE |= _SURROGATES


def render(package: str, template: str, **values: Any) -> Markup:
    """Returns a template of `package`, or of vlp.core, with these values filled in."""
    return Markup(_environment(package).get_template(template).render(values))


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    packages = dict.fromkeys((package, "vlp.core"))
    env = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["cut"] = text
    env.globals |= {"asset": functools.partial(asset, package), "digest": _digest}
    return env


def asset(package: str, name: str) -> Markup:
    """Returns a style or a script of `package`, or of vlp.core, as it is."""
    env = _environment(package)
    assert env.loader
    return Markup(env.loader.get_source(env, name)[0])


def _digest(script: str) -> str:
    """Returns the SHA-256 of a script in base64, by which a page's policy allows it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def visible(value: object, most: int = MAX_CHARS) -> str:
    """Returns at most `most` characters of a text, with control characters as visible signs. Does not escape."""
    whole = str(value)
    cut = whole if len(whole) <= most else whole[:most] + "…"
    return cut.translate(_VISIBLE)


def text(value: object, most: int = MAX_CHARS) -> Markup:
    """Returns `visible` text, escaped for HTML and its attributes."""
    return escape(visible(value, most))


def words(identifier: str) -> str:
    """Returns an identifier as words: "skin_tone" as "skin tone", "val+test" as "val + test"."""
    return " ".join(identifier.replace("_", " ").replace("+", " + ").split())


def title(label: str) -> str:
    """Returns a label that begins with a capital."""
    return label[:1].upper() + label[1:]
