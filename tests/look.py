"""A page as headless Chromium draws it: on a desktop, on a phone and on paper, as PNG to be looked at.

    mlxgpt report runs/mlx runs/torch -o page.html
    python tests/look.py page.html looks/          needs chromium and pdftoppm (Debian: chromium poppler-utils)

Also says what a picture hides: text that is wider than the phone, and anything that the page asked the network for.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = {"desktop": 1280, "phone": 390}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# the page in a frame of the phone's width: a headless window is at least 500 pixels wide
FRAME = """<!doctype html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:{height}px" onload="
const d = this.contentDocument.documentElement, all = this.contentWindow.performance.getEntriesByType('resource');
document.title = JSON.stringify({{height: d.scrollHeight, width: d.scrollWidth, asked: all.map(e => e.name)}})
"></iframe>"""


def chromium(*arguments: str) -> str:
    """What it prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "--allow-file-access-from-files", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("paper-*.png"):
        old.unlink()
    url, wrong = args.page.resolve().as_uri(), 0
    for name, width in WIDTHS.items():
        frame, height, found = args.out.resolve() / f".{name}.html", 1000, {}
        for _ in range(2):  # once to learn how high it is
            frame.write_text(FRAME.format(page=url, width=width, height=height))
            title = re.search(r"<title>(.*?)</title>", chromium("--dump-dom", frame.as_uri()))
            assert title, "the page did not load"
            found = json.loads(title[1].replace("&quot;", '"'))
            height = found["height"]
        picture = args.out.resolve() / f"{name}.png"
        chromium(f"--window-size={width},{height}", f"--screenshot={picture}", frame.as_uri())
        frame.unlink()
        wrong += found["width"] > width or bool(found["asked"])
        print(f"{picture}: {width} x {height}; content {found['width']} wide; asked for {found['asked'] or 'nothing'}")
    pdf = args.out.resolve() / "paper.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", url)
    subprocess.run(["pdftoppm", "-r", "70", "-png", str(pdf), str(args.out / "paper")], check=True)
    print(f"{pdf} and {', '.join(sorted(path.name for path in args.out.glob('paper-*.png')))}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
