"""Fail if a link within the built documentation is broken: a missing page or anchor."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).resolve().parents[1] / "docs" / "_build" / "html"


class Page(HTMLParser):
    """The anchors of a page, and its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]


def broken(site: Path) -> list[str]:
    """Complaints about all pages below a folder."""
    skipped = {"_static", "_modules"}  # the latter are listings whose links are guessed by Sphinx
    pages = {path: Page(path) for path in site.rglob("*.html") if not skipped & set(path.parts)}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{path.relative_to(site)}: {link} does not exist")
            elif place and target in pages and place not in pages[target].places:
                found.append(f"{path.relative_to(site)}: {link} names a place that does not exist")
    return found


def main() -> int:
    site = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SITE
    if not (site / "index.html").exists():
        print(f"{site} has no index.html: run `make docs`", file=sys.stderr)
        return 1
    complaints = broken(site)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages, {len(complaints)} broken links")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
