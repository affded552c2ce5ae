"""Find dead links and anchors within the built site.

python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors and the links of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            if name in ("href", "src") and value:
                self.links.add(value)


def dead_links(site: Path) -> list[str]:
    """Return the links of all pages that lead to no file or anchor of the site."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.exists()
            if found and parts.fragment and target in pages:
                found = unquote(parts.fragment) in pages[target].anchors
            if not found:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


def main() -> None:
    """Print the dead links, and exit with status 1 if there are any, or if there is no page."""
    site = Path(sys.argv[1])
    if not any(site.rglob("*.html")):
        sys.exit(f"{site} must hold a built site, got no page")
    dead = dead_links(site)
    print(*dead, sep="\n", end="\n" if dead else "")
    sys.exit(1 if dead else 0)


if __name__ == "__main__":
    main()
