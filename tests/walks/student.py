"""Somebody who has read a book on GPTs: a chapter, the GPT on one page, a look inside a model, the documentation.

python tests/walks/student.py
"""

import json
import re
import sys

from walk import ROOT, TINY, books, check, command, empty_folder, main, offline, program

CHAPTERS = ROOT / "docs" / "course"


def walk() -> None:
    """From the first chapter to attention maps of one's own run."""
    from book.running import run_page

    found = sorted(path.name for path in CHAPTERS.glob("[0-9][0-9]-*.md"))
    check([name[:2] for name in found] == [f"{n:02}" for n in range(1, 17)], "chapters 01 to 16 are there", found)
    for name in found:
        text = (CHAPTERS / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+\.md)", text):
            check((CHAPTERS / target).is_file(), f"{name}: its link leads somewhere", target)
        check(text.count("??? question") == 5, f"{name}: five questions", text.count("??? question"))
    with empty_folder() as folder:
        print(f"> {found[0]}: its snippets, its exercise")
        wrong = run_page(CHAPTERS / found[0], folder)
        check(not wrong, f"{found[0]} prints what it shows", wrong)

    books("books", 4)
    gpt2 = ("--set", "model.family=gpt2", "--set", "train.eval_every=0")
    command("train", "--data", "books/", *TINY, "--steps", "20", *gpt2, "--out", "runs/first")
    program(str(ROOT / "examples" / "gpt.py"), "runs/first", "Ada saw")

    command("inspect", "runs/first", "--text", "Ada saw the book.", "--out", "inside.html", says=("inside.html",))
    page = offline("inside.html")
    check(all(each in page for each in ("Ada", "logit lens", "attention")), "the page shows the inside", page[:200])
    seen = [
        json.loads(command("inspect", "runs/first", "--text", "Ada saw the book.", "--json", "--backend", each))
        for each in ("mlx", "torch")
    ]
    check(abs(seen[0]["loss"] - seen[1]["loss"]) < 1e-5, "both frameworks see the same", [one["loss"] for one in seen])
    command("keys", "warmup", says=("[optim]", "warmup"))
    command("train", "--data", "books/", "--learning-rate", "1", code=2, says=("--lr",))


if __name__ == "__main__":
    sys.exit(main(walk))
