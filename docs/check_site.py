"""Find dead links and anchors, and code that is wider than a page, in the built site.

python docs/check_site.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

COLUMNS = 100
"""A page shows this many columns of code without scrolling, see ``_static/custom.css``."""


class Page(HTMLParser):
    """The anchors, the links and the wide lines of code of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.wide: list[str] = []
        self._code: list[str] | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self._code = []
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            if name in ("href", "src") and value:
                self.links.add(value)

    def handle_data(self, data: str) -> None:
        if self._code is not None:
            self._code.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" and self._code is not None:
            lines = "".join(self._code).splitlines()
            self.wide += [line.strip() for line in lines if len(line) > COLUMNS]
            self._code = None


def faults(site: Path) -> list[str]:
    """Return the links that lead to no file or anchor of the site, and the wide lines of code."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name}: {link}" for link in sorted(page.links) if _is_dead(link, path, pages)]
        if not name.parts[0].startswith("_"):  # source code has its own limit
            found += [f"{name}: over {COLUMNS} columns: {line}" for line in page.wide]
    return found


def _is_dead(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.fragment and target in pages:
        return unquote(parts.fragment) not in pages[target].anchors
    return not target.exists()


def main() -> None:
    """Print the faults, and exit with status 1 if there are any, or if there is no page."""
    site = Path(sys.argv[1])
    if not any(site.rglob("*.html")):
        sys.exit(f"{site} must hold a built site, got no page")
    found = faults(site)
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
