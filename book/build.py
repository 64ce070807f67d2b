"""`make docs`: the site, its links, and the course as a PDF, without the network."""

import logging
import os
import sys

from book import check, pdf
from book.page import ROOT


def main() -> int:
    """Builds build/site and returns 1 if something in it is wrong."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort, MkDocsException

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except (Abort, MkDocsException) as error:
        print(f"python -m book: error: {error}", file=sys.stderr)
        return 1
    finally:
        config.plugins.on_shutdown()
    site = ROOT / "build/site"
    printed = pdf.write(site)
    if wrong := check.problems(site):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in site.glob("**/*") if path.is_file())
    count = len(list(site.glob("**/*.html")))
    print(f"build/site/index.html: {count} pages, {size / 1e6:.1f} MB; its links lead somewhere, nothing is foreign")
    if printed is None:
        print("no PDF of the course: no Chromium here (Debian: apt install chromium)")
    else:
        print(f"{printed.relative_to(ROOT)}: {printed.stat().st_size / 1e6:.1f} MB")
    return 0
