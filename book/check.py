"""Whether every link of the built site leads somewhere, and whether it asks the network for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
CSS_URL = re.compile(r"url\(\s*['\"]?(?!data:)([^'\")]+)")
HOSTS = re.compile(r"https?://[\w.-]*(?:unpkg|jsdelivr|cdnjs|googleapis|gstatic|polyfill)[\w./@-]*")


class Link(NamedTuple):
    tag: str
    attribute: str
    address: str


class Reader(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[Link] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [Link(tag, name, given[name]) for name in ("href", "src") if given.get(name)]


def problems(site: Path) -> list[str]:
    """A line for each link that leads nowhere and each thing that would be asked of the network."""
    pages = {path.resolve(): Reader(path.read_text(encoding="utf-8")) for path in sorted(site.glob("**/*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        for link in page.links:
            wrong = broken(link, path, pages, site.resolve())
            if wrong:
                found.append(f"{name}: {link.address}: {wrong}")
    for path in sorted([*site.glob("**/*.css"), *site.glob("**/*.js"), *site.glob("**/*.html")]):
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(site)}: {address}: a foreign address" for address in set(HOSTS.findall(text))]
        if path.suffix == ".css":
            for address in CSS_URL.findall(text):
                if urlsplit(address).scheme or not (path.parent / urlsplit(address).path).is_file():
                    found.append(f"{path.relative_to(site)}: {address}: no such file in the site")
    return sorted(set(found))


def broken(link: Link, path: Path, pages: dict[Path, Reader], site: Path) -> str:
    """What is wrong with a link of the page at ``path``; empty if nothing is."""
    parts = urlsplit(link.address)
    if parts.scheme in ("http", "https") or parts.netloc:
        loaded = (link.tag, link.attribute) in LOADED
        return "asks the network" if loaded else ""  # a link that a reader may follow
    if parts.scheme:
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        return "" if path.name == "404.html" else "no such file in the site"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "no such heading" if not parts.fragment.startswith("__") else ""
    return ""
