"""The chapters as notebooks: what runs is a cell with the output that the page has; the rest is text."""

import os
import re
import sys
import tempfile
import textwrap
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from book.page import DOCS, ROOT, Fence, chapters, fences, output_of
from book.source import shown

ADMONITION = re.compile(r'(?P<indent> *)(?P<mark>!!!|\?\?\?\+?) (?P<kind>\w+)(?: "(?P<title>[^"]*)")?')
LINK = re.compile(r"\]\((?P<page>[^):#]+)\.md(?=[#)])")
# before the first cell, and without a name that a cell could use
CPU = "(lambda _, mx: mx.set_default_device(mx.Device(mx.cpu)))(__import__('mlxgpt.blas'), __import__('mlx.core').core)"
FOLDER = ROOT / "build" / "notebooks"


def is_chapter(path: Path) -> bool:
    return path in chapters()


def place(path: Path) -> Path:
    """Where a chapter's notebook lies."""
    return FOLDER / f"{path.stem}.ipynb"


def text(path: Path) -> str:
    """The notebook of a chapter as JSON."""
    import jupytext

    return jupytext.writes(notebook(path), fmt="ipynb")


def notebook(path: Path) -> Any:
    """The notebook of a chapter; its cells run from top to bottom, a check fails until there is an answer."""
    import jupytext
    from nbformat.v4 import new_output

    markdown, outputs = cells(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    made = jupytext.reads(markdown, fmt="md")
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    runs = [cell for cell in made.cells if cell.cell_type == "code"]
    for cell, output in zip(runs, outputs, strict=True):
        if output:
            cell.outputs = [new_output("stream", name="stdout", text=output + "\n")]
    for number, cell in enumerate(made.cells):
        cell["id"] = f"{path.stem[:2]}-{number}"  # the same notebook each time
    return made


def cells(markdown: str, name: str) -> tuple[str, list[str]]:
    """The page in jupytext's Markdown, and the output of each of its cells."""
    lines, found = markdown.splitlines(), fences(markdown, name)
    made: list[str] = []
    outputs: list[str] = []
    prose: list[str] = []
    place, inside, check = 0, 0, None

    def cell(fence: Fence, metadata: str, output: str) -> None:
        if prose_text := plain("\n".join(prose)):
            made.append(prose_text)
        prose.clear()
        made.append(f"```python{metadata}\n{fence.body}\n```")
        outputs.append(output)

    for fence, following in zip_longest(found, found[1:]):
        prose += outdented(lines[place : fence.first], inside)
        inside = fence.indent
        place = fence.last + 1
        output = output_of(fence, following, lines)
        if fence.language == "source":
            for piece in shown(fence.body):
                label = f"{piece.label}: " if piece.label else ""
                prose += [*listing(f"{label}`{piece.path}`", piece.code, fence.indent)]
        elif fence.language == "python" and fence.role:
            hidden = ' jupyter={"source_hidden": true}' if fence.role == "answer" or "hidden" in fence.options else ""
            tags = ' tags=["raises-exception"]' if fence.role == "check" else ""
            cell(fence, tags or hidden, output.body if output else "")
            if fence.role == "check":
                check = fence
            elif fence.role == "answer" and check:
                cell(check, "", "")
        elif fence.role == "output":
            continue
        elif fence.language == "sh" and fence.role:
            tags = ' tags=["raises-exception"]' if "exit" in fence.options else ""
            cell(replace(fence, body=f"%%bash\n{with_flags(fence)}"), tags, output.body if output else "")
        else:
            prose += listing("", fence.body, fence.indent)
    prose += outdented(lines[place:], inside)
    if prose_text := plain("\n".join(prose)):
        made.append(prose_text)
    return "\n\n".join(made) + "\n", outputs


def outdented(lines: list[str], indent: int) -> list[str]:
    """The lines below a fence in an admonition: those that are still inside lose its indentation."""
    made, still = [], indent > 0
    for line in lines:
        still = still and (not line.strip() or line.startswith(" " * indent))
        made.append(line[indent:] if still else line)
    return made


def with_flags(fence: Fence) -> str:
    """Commands with the flags that make them short."""
    lines = fence.body.splitlines()
    return "\n".join(f"{line} {fence.flags}" if fence.flags and line.startswith("mlxgpt ") else line for line in lines)


def listing(title: str, code: str, indent: int) -> list[str]:
    """Code that is only read: indented, so that jupytext makes no cell of it."""
    made = [f"{title}:", ""] if title else []
    return [" " * indent + line for line in ["", *made, *(f"    {line}" for line in code.splitlines()), ""]]


def plain(prose: str) -> str:
    """Text without mkdocs's marks: admonitions are headings, collapsed ones <details>; links lead to the pages."""
    lines, made, n = re.sub(r"<!--.*?-->\n?", "", prose, flags=re.DOTALL).splitlines(), [], 0
    while n < len(lines):
        match = ADMONITION.fullmatch(lines[n].rstrip())
        if match is None:
            made.append(lines[n])
            n += 1
            continue
        inside = [n + 1]
        indent = match["indent"] + "    "
        while inside[-1] < len(lines) and (not lines[inside[-1]].strip() or lines[inside[-1]].startswith(indent)):
            inside.append(inside[-1] + 1)
        body = plain(textwrap.dedent("\n".join(lines[n + 1 : inside[-1]])))
        title = match["title"] if match["title"] is not None else match["kind"].capitalize()
        if match["mark"] == "!!!" or match["kind"] == "answer":  # an answer's cell is hidden itself
            made += [f"**{title}**", "", body, ""]
        else:
            made += ["<details>", f"<summary>{title}</summary>", "", body, "", "</details>", ""]
        n = inside[-1]
    return LINK.sub(r"](\g<page>.html", "\n".join(made)).strip("\n")  # a notebook lies beside the site's pages


def write(run: bool) -> list[Path]:
    """Writes every chapter's notebook into build/notebooks; ``run``: with the outputs of a run, see ``execute``."""
    import jupytext

    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in chapters():
        made = notebook(path)
        if run:
            execute(made)
        jupytext.write(made, place(path), fmt="ipynb")
        print(place(path).relative_to(DOCS.parent))
    return [place(path) for path in chapters()]


def execute(made: Any) -> None:
    """Runs every cell on the CPU in a kernel of its own; its folder is empty, its sockets are files of this user.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        where = {"metadata": {"path": folder}}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        client = NotebookClient(made, km=manager, timeout=600, record_timing=False, resources=where)
        client.extra_arguments = [f"--IPKernelApp.exec_lines={CPU}"]
        try:
            client.execute(env=os.environ | {"PATH": path, "MLXGPT_DEVICE": "cpu"})
        finally:
            manager.shutdown_kernel(now=True)
