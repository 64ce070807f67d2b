"""`make docs`: the site, its links, and the course as a PDF, without the network."""

import logging
import os
import sys
from pathlib import Path

from book import check, pdf
from book.page import ROOT

SITE = ROOT / "build/site"


def main(site: Path = SITE, printed: bool = True) -> int:
    """Builds the site, and if ``printed`` the PDF where there is a Chromium; returns 1 if something in it is wrong."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort, MkDocsException

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(site))
    config.extra["pdf"] = printed and pdf.browser() is not None
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except (Abort, MkDocsException) as error:
        print(f"python -m book: error: {error}", file=sys.stderr)
        return 1
    finally:
        config.plugins.on_shutdown()
    made = pdf.write(site) if config.extra["pdf"] else None
    if wrong := check.problems(site):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in site.glob("**/*") if path.is_file())
    count = len(list(site.glob("**/*.html")))
    print(f"{site}/index.html: {count} pages, {size / 1e6:.1f} MB; its links lead somewhere, nothing is foreign")
    if made:
        print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
    elif printed:
        print("no PDF of the course: no Chromium here (Debian: apt install chromium)")
    return 0
