"""Reads a page as a browser would: its elements, its text, and what it would fetch."""

import html.parser

# Attributes through which a browser would fetch something.
FETCHING = {
    "src",
    "href",
    "srcset",
    "xlink:href",
    "action",
    "poster",
    "data",
    "formaction",
    "background",
}
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Collects a page's elements, text and problems: unbalanced tags, anything from outside."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.fetches: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.fetches += [str(v) for k, v in attrs if k in FETCHING]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert [self._open.pop() if self._open else None] == [tag]

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open[-1:]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str, cls: str = "") -> int:
        classes = [(a.get("class") or "").split() for t, a in self.tags if t == tag]
        return sum(not cls or cls in c for c in classes)
