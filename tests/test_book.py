"""The machinery of the site and the course: what a page says is read, run, compared, shown and checked."""

import subprocess
import sys
from pathlib import Path

import pytest

from book import check, hooks, mathematics, notebooks, pdf
from book.compare import same
from book.page import ROOT, BookError, chapters, fences
from book.running import run_page
from book.source import shown

CHAPTER = """# A chapter

```python run
import math

print(f"{math.pi:.4f}")
```

```text output
3.1416
```

<!-- python run
secret = 7
-->

!!! exercise "Twice"

    Write `twice`.

    ```python starter
    def twice(x): ...
    ```

    ```python check
    assert twice(secret) == 14
    ```

??? answer "An answer"

    ```python answer
    def twice(x):
        return 2 * x
    ```

    It adds.

??? question "1. Why?"

    Because.
"""


def wrong(text: str, folder: Path, **flags: bool) -> list[str]:
    """What is wrong with a page of this text."""
    (folder / "page.md").write_text(text)
    (folder / "work").mkdir(exist_ok=True)
    return run_page(folder / "page.md", folder / "work", **flags)


def test_a_page_that_says_what_it_prints_is_right(tmp_path: Path) -> None:
    assert wrong(CHAPTER, tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3.1416\n", "3.1418\n", r"page.md:3: the page has\n3.1418\nand it prints\n3.1416"),
        ("import math", "import math, nothing", "page.md:4: ModuleNotFoundError"),
        ("```text output\n3.1416\n```\n", "", "page.md:3: the page has"),
        ("return 2 * x", "return 3 * x", "page.md:26: AssertionError"),
        ("def twice(x): ...", "def twice(x): return 14", "page.md:25: this check passes without an answer"),
        ("secret = 7", "secret = 8", "AssertionError"),
    ],
)
def test_what_a_page_gets_wrong_is_named_with_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert CHAPTER.count(old) == 1
    (found,) = wrong(CHAPTER.replace(old, new), tmp_path)
    assert message.replace(r"\n", "\n") in found


def test_write_puts_the_output_in_and_nothing_else_changes(tmp_path: Path) -> None:
    for stale in (
        CHAPTER.replace("3.1416\n```\n", "3\n4\n```\n"),
        CHAPTER.replace("\n```text output\n3.1416\n```\n", ""),
    ):
        assert wrong(stale, tmp_path, write=True)
        assert (tmp_path / "page.md").read_text() == CHAPTER


def test_commands_run_with_their_flags_and_stand_ins_in_one_folder(tmp_path: Path) -> None:
    page = """<!-- in tests: NAME = made -->
<!-- run with: --vocab-size 260 -->

```sh run
mlxgpt tokenizer train text.txt --out NAME --vocab-size 900  # in the test, 260
ls NAME | head -n 1
```

```text output
...260 tokens...
```

```sh run exit 2
mlxgpt tokenizer train nothing.txt --out other
```
"""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/text.txt").write_text("a b c d e f g " * 40)
    assert wrong(page, tmp_path) == []
    assert (tmp_path / "work/made").is_dir()
    (found,) = wrong(page.replace("exit 2", "").replace("NAME = made", "NAME = again"), tmp_path)
    assert "exit code 2, expected 0" in found


def test_what_is_slow_runs_only_where_it_is_asked_for(tmp_path: Path) -> None:
    page = "```python run slow\nraise ValueError\n```\n"
    assert wrong(page, tmp_path) == []
    assert "ValueError" in wrong(page, tmp_path, slow=True)[0]


@pytest.mark.parametrize(
    ("expected", "found", "equal"),
    [
        ("loss 2.0794", "loss 2.0795", True),
        ("loss 2.0794", "loss 2.0796", False),
        ("loss 2.0794", "lost 2.0794", False),
        ("[0.1  -0.2]", "[ 0.1 -0.2]", True),
        ("1e-3", "1e-4", False),
        ("1.5e-08", "1.6e-08", True),
        ("1.5e-08", "1.7e-08", False),
        ("300 steps", "301 steps", False),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nb\nc", False),
        ("a\n...\nd", "a\nd", True),
        ("...\nd", "d", True),
        ("...\nd", "c d", False),
        ("done in ... s", "done in 3.2 s", True),
        ("0.9 ", "0.9", True),
        ("0.9", "nan", False),
        ("", "x", False),
    ],
)
def test_outputs_are_the_same_up_to_the_last_digit_of_a_decimal(expected: str, found: str, equal: bool) -> None:
    assert same(expected, found) is equal


def test_an_unknown_word_after_a_language_and_a_fence_without_an_end_are_errors() -> None:
    with pytest.raises(BookError, match=r"page:1: 'ran' after python"):
        fences("```python ran\n```\n", "page")
    with pytest.raises(BookError, match="page:2: this fence has no end"):
        fences("\n```python run\nx = 1\n", "page")


def test_a_symbol_is_shown_in_both_frameworks_and_a_method_by_its_name_in_each() -> None:
    mlx, torch = shown("model.Block.__call__\nfrom: place =\nto: return after + z")
    assert (mlx.label, mlx.path) == ("MLX", "mlxgpt/model.py")
    assert (torch.label, torch.path) == ("PyTorch", "torch_ref/model.py")
    for piece in (mlx, torch):
        assert piece.code.splitlines()[0].startswith("place = ") and piece.code.endswith("return after + z")
    (whole,) = shown("common.model.rotary.tables")
    assert whole.label == "" and whole.code.startswith("def tables(")
    pair = shown("mlxgpt/fast.py tiled | mlxgpt/fast.py attention")
    assert [piece.code.split("(")[0] for piece in pair] == ["def tiled", "def attention"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("attention.attent", "mlxgpt/attention.py has no attent"),
        ("model.Block.nothing", "mlxgpt/model.py has no Block.nothing"),
        ("modle.attend", "no file mlxgpt/modle.py"),
        ("layers.ONE_HOT", "torch_ref/layers.py has no ONE_HOT"),
        ("attention.attend\nfrom: no such line", "mlxgpt/attention.py attend has no line with 'no such line'"),
        ("attention.attend\nto torch: no such line", "torch_ref/attention.py attend has no line"),
        ("attention.attend\nuntil: x", "expected from:, to:"),
        ("examples/none.py", "examples/none.py: no such file"),
    ],
)
def test_what_the_code_no_longer_has_is_an_error(body: str, message: str) -> None:
    with pytest.raises(BookError) as raised:
        shown(body)
    assert message in str(raised.value)


def test_a_page_as_the_site_shows_it() -> None:
    source = "```source\nattention.rotate\n```\n"
    text = hooks.rendered(CHAPTER + source + source, "page")
    assert "secret = 7" not in text
    assert "```{.text .output}\n3.1416\n```" in text
    assert '    ```{.python title="The check"}\n' in text
    assert text.count('<div class="pair" markdown>') == text.count('=== "MLX"') == text.count('=== "PyTorch"') == 2
    assert "def rotate(" in text


def test_a_notebook_has_the_pages_cells_outputs_and_a_check_that_may_fail() -> None:
    markdown, outputs = notebooks.cells(CHAPTER, "page")
    assert outputs == ["3.1416", "", "", "", "", ""]
    assert markdown.count("```python") == 6
    assert '```python tags=["raises-exception"]\nassert twice' in markdown
    assert '```python jupyter={"source_hidden": true}\nsecret' in markdown
    assert "\nIt adds." in markdown and "<summary>1. Why?</summary>" in markdown and "???" not in markdown


def test_commands_of_a_chapter_are_cells_of_bash() -> None:
    page = "<!-- run with: --steps 2 -->\n\n```sh run\nmlxgpt train x\nls\n```\n\n```text output\na\n```\n"
    markdown, outputs = notebooks.cells(page, "page")
    assert markdown == "```python\n%%bash\nmlxgpt train x --steps 2\nls\n```\n" and outputs == ["a"]


def test_formulas_are_drawn_when_the_site_is_built_and_a_wrong_one_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text(
        '<span class="arithmatex">\\(x &lt; y\\)</span><div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>'
    )
    assert mathematics.draw(tmp_path) == 2
    text = page.read_text()
    assert text.count('class="katex"') == 2 and text.count('class="katex-display"') == 1 and "\\(" not in text
    page.write_text('<span class="arithmatex">\\(\\notacommand\\)</span>')
    with pytest.raises(BookError, match="a.html: .*notacommand.*Undefined control sequence"):
        mathematics.draw(tmp_path)


def test_links_that_lead_nowhere_and_foreign_addresses_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="here"></h1><a href="b.html#there"></a><a href="b.html#lost"></a><a href="c.html"></a>'
        '<a href="#here"></a><a href="https://example.org"></a>'
        '<script src="https://unpkg.com/x"></script><img src="p.png">'
    )
    (tmp_path / "b.html").write_text('<h1 id="there"></h1>')
    (tmp_path / "s.css").write_text("a { src: url(f.woff2) } b { src: url(data:x) }")
    found = check.problems(tmp_path)
    assert found == [
        "a.html: b.html#lost: no such heading",
        "a.html: c.html: no such file in the site",
        "a.html: https://unpkg.com/x: a foreign address",
        "a.html: https://unpkg.com/x: asks the network",
        "a.html: p.png: no such file in the site",
        "s.css: f.woff2: no such file in the site",
    ]


OFFLINE = """
import pathlib, socket, sys
def refused(*_, **__): raise OSError("the build asked the network")
socket.socket.connect = socket.getaddrinfo = refused
from book import build
sys.exit(build.main(pathlib.Path(sys.argv[1]), printed=sys.argv[2] == "printed"))
"""


def test_the_site_builds_without_the_network_and_all_its_links_lead_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "site"), "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/extending.html").read_text()
    assert "katex.min.css" in page and "iframe-worker/shim.js" in page
    reference = (tmp_path / "site/api/model.html").read_text()
    assert 'id="mlxgpt.attention.attend"' in reference


@pytest.mark.slow
@pytest.mark.skipif(pdf.browser() is None, reason="no Chromium")
def test_the_course_is_printed_with_every_chapter(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "site"), "printed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = pdf.one_page(tmp_path / "site")
    assert page.count('<article class="md-content__inner md-typeset chapter">') == len(chapters()) + 2
    assert page.count("<title>The course of mlxgpt</title>") == page.count("<title>") == 1
    assert page.count("<details open") == page.count("<details") > 0
    printed = (tmp_path / "site/course/mlxgpt-course.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") > len(chapters())
