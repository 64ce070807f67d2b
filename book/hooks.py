"""What mkdocs asks while it builds: our fences become tabs, titles and outputs; nothing foreign is left in the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

from book import mathematics, notebooks
from book.page import DOCS, NAMED, ROOT, BookError, Fence, fences
from book.source import Shown, shown

TITLES = {"starter": "Your turn", "check": "The check", "answer": "An answer"}
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
FOREIGN = re.compile(r"https?://(unpkg\.com|cdn\.jsdelivr\.net|cdnjs\.cloudflare\.com|fonts\.g\w+\.com)/")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page's text with our fences as Material's."""
    name = f"docs/{page.file.src_uri}"
    try:
        text = rendered(markdown, name)
    except BookError as error:
        raise PluginError(f"{name}: {error}") from None
    path = ROOT / name
    if notebooks.is_chapter(path):
        text += f"\n\n---\n\n[This chapter as a notebook]({notebooks.place(path).name}){{ .notebook }}\n"
    if page.file.src_uri == "course/index.md":
        text += "\n" + "".join(f"1. [{title_of(each)}]({each.name})\n" for each in notebooks.chapters())
    if page.file.src_uri == "course/index.md" and config["extra"].get("pdf"):
        text += '\n\n<a class="notebook" href="mlxgpt-course.pdf">The course as a PDF</a>\n'  # build.py prints it
    return text


def on_config(config: Any) -> Any:
    """The chapters of the course below its first page."""
    for section in config["nav"] or []:
        if "Course" in section:
            section["Course"][1:1] = [path.relative_to(DOCS).as_posix() for path in notebooks.chapters()]
    return config


def title_of(path: Path) -> str:
    """A page's first heading."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()


def on_files(files: Any, config: Any) -> Any:
    """The notebooks of the course's chapters, beside them."""
    from mkdocs.structure.files import File

    for path in notebooks.chapters():
        place = f"course/{notebooks.place(path).name}"
        files.append(File.generated(config, place, content=notebooks.text(path)))
    return files


def on_post_build(config: Any) -> None:
    """Formulas are drawn; no address of a CDN stays, also not of what Material would load on demand; no source maps."""
    site = Path(config["site_dir"])
    try:
        mathematics.draw(site)
    except BookError as error:
        raise PluginError(str(error)) from None
    for path in site.glob("assets/**/*.map"):
        path.unlink()
    for path in [*site.glob("assets/**/*.js"), *site.glob("**/*.html")]:
        text = path.read_text(encoding="utf-8")
        if FOREIGN.search(text) and path.suffix == ".js":
            path.write_text(FOREIGN.sub("/absent/", text), encoding="utf-8")


def rendered(markdown: str, name: str) -> str:
    """The text with the fences of page.py as Material draws them, and without HTML comments."""
    lines, made, place = markdown.splitlines(), [], 0
    for fence in fences(markdown, name):
        made.append(without_comments(lines[place : fence.first]))
        place = fence.last + 1
        if "hidden" not in fence.options:
            made.append(drawn(fence, lines))
    made.append(without_comments(lines[place:]))
    return "\n".join(made) + "\n"


def without_comments(lines: list[str]) -> str:
    return COMMENT.sub("", "\n".join(lines) + "\n").removesuffix("\n")


def drawn(fence: Fence, lines: list[str]) -> str:
    """A fence in Material's words."""
    if fence.language == "source":
        text = tabs(shown(fence.body))
    elif fence.role == "output":
        text = f"```{{.text .output}}\n{fence.body}\n```"
    elif fence.role in TITLES or fence.role in NAMED:
        title = TITLES.get(fence.role) or fence.options[0]
        text = f'```{{.{fence.language} title="{title}"}}\n{fence.body}\n```'
    elif fence.role:
        text = f"```{fence.language}\n{fence.body}\n```"
    else:
        return "\n".join(lines[fence.first : fence.last + 1])
    return "\n".join(" " * fence.indent + line if line else "" for line in text.splitlines())


def tabs(pieces: list[Shown]) -> str:
    """A code block, or one a framework in linked tabs, which a wide screen shows beside each other."""
    made = []
    for piece in pieces:
        block = f'```{{.python title="{piece.path}"}}\n{piece.code}\n```'
        if piece.label:
            block = f'=== "{piece.label}"\n\n' + "\n".join(f"    {line}" if line else "" for line in block.splitlines())
        made.append(block)
    text = "\n\n".join(made)
    return f'<div class="pair" markdown>\n\n{text}\n\n</div>\n' if len(pieces) > 1 else f"{text}\n"
