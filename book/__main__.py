"""The documentation site and the course.

python -m book build                     build/site, its links checked, and the course as a PDF; make docs
python -m book run PAGE ... [--write]    runs pages as a reader would; --write puts what they print into them
python -m book notebooks [--run]         build/notebooks; make notebooks
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from book.page import ROOT, BookError, runnable


def run(pages: list[Path], write: bool, quick: bool) -> int:
    """Runs the pages, each in a folder of its own; 1 if one prints something else than it says."""
    os.environ.setdefault("MLXGPT_DEVICE", "cpu")
    from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

    # isort: split
    import mlx.core as mx

    from book.running import run_page

    if os.environ["MLXGPT_DEVICE"] == "cpu":
        mx.set_default_device(mx.Device(mx.cpu))
    failed = 0
    for page in pages or runnable():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            wrong = run_page(page.resolve(), Path(folder), slow=not quick, write=write)
        print("\n\n".join([*wrong, ""]), end="")
        said = "ok" if not wrong else "differs; --write puts the new output in" if not write else "see above"
        print(f"{page.resolve().relative_to(ROOT)}: {time.perf_counter() - start:.1f} s: {said}")
        failed += bool(wrong)
    return bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser("python -m book", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="the site, checked, and the PDF")
    running = verbs.add_parser("run", help="run pages and compare what they print")
    running.add_argument(
        "pages", nargs="*", type=Path, metavar="PAGE", help="default: every page with something to run"
    )
    running.add_argument("--write", action="store_true", help="put what was printed into the page")
    running.add_argument("--quick", action="store_true", help="leave out what is marked slow, as make test does")
    books = verbs.add_parser("notebooks", help="the chapters as notebooks")
    books.add_argument("--run", action="store_true", help="run every cell in a kernel")
    args = parser.parse_args()
    try:
        if args.verb == "run":
            return run(args.pages, args.write, args.quick)
        if args.verb == "notebooks":
            from book import notebooks

            notebooks.write(args.run)
            return 0
        from book import build

        return build.main()
    except BookError as error:
        print(f"python -m book: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"python -m book: error: {error.name} is missing: pip install -e '.[docs]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
