"""The course as one PDF: the chapters of the built site on one page, printed by Chromium."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from book.page import BookError, chapters

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
    "--virtual-time-budget=20000", "--no-pdf-header-footer",
)  # fmt: skip
ARTICLE = re.compile(r'<article class="md-content__inner md-typeset">(.*?)</article>', re.DOTALL)
HEAD = re.compile(r"<head>.*?</head>", re.DOTALL)
TITLE = re.compile(r"<title>.*?</title>", re.DOTALL)
STYLE = """<style>
  @page { margin: 16mm 14mm; @bottom-center { content: counter(page); font: 8px sans-serif } }
  .chapter + .chapter { break-before: page }
  .md-typeset { font-size: 11px }
  .md-typeset pre > code { font-size: 8px }
  .headerlink, .md-code__nav, .md-clipboard { display: none }
</style>"""
IDS = re.compile(r'(?<= )(id|for|name|href)="(#?)(__tabbed_|fn)')


def browser() -> str | None:
    """A Chromium of this machine."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (str(MAC) if MAC.is_file() else None)


def one_page(site: Path) -> str:
    """All chapters as one page of HTML that lies in the site's course/; answers are open, tabs below each other."""
    made, head = [], ""
    names = ["index", *(path.stem for path in chapters()), "plain-page"]
    for number, path in enumerate(site / f"course/{name}.html" for name in names):
        text = path.read_text(encoding="utf-8")
        found, head_found = ARTICLE.search(text), HEAD.search(text)
        if found is None or head_found is None:
            raise BookError(f"{path}: no article: Material's page has changed")
        head = TITLE.sub("<title>The course of mlxgpt</title>", head_found[0])
        body = re.sub(r'<p><a class="notebook".*?</p>', "", found[1])
        body = IDS.sub(rf'\1="\2c{number}\3', body).replace("<details", "<details open")
        made.append(f'<article class="md-content__inner md-typeset chapter">{body}</article>')
    body = f'<body dir="ltr" data-md-color-scheme="default">{STYLE}{"".join(made)}</body>'
    return f'<!doctype html><html lang="en">{head}{body}</html>'


def write(site: Path) -> Path:
    """course/mlxgpt-course.pdf in the site.

    Raises:
        BookError: there is no browser, or it failed.
    """
    program = browser()
    if program is None:
        raise BookError("no Chromium: expected one of " + ", ".join(NAMES))
    page, out = site / "course/print.html", site / "course/mlxgpt-course.pdf"
    page.write_text(one_page(site), encoding="utf-8")
    try:
        with tempfile.TemporaryDirectory() as profile:
            command = [program, *FLAGS, f"--user-data-dir={profile}", f"--print-to-pdf={out}", page.resolve().as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        raise BookError(f"{program}: did not print {page} in 180 s") from None
    finally:
        page.unlink()
    if done.returncode or not out.is_file():
        raise BookError(f"{program}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return out
