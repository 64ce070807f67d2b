"""Somebody with rows of questions and answers: look at them, an adapter, a conversation, one file for Ollama.

The base is a run of forty steps, in the place of a model from the hub.

python tests/walks/questions.py
"""

import json
import sys
from pathlib import Path

from walk import TINY, books, check, command, lines, main

RUN = "runs/rows-lora"
KEYS = ("--set", "tune.prompt_key=question", "--set", "tune.completion_key=answer")


def walk() -> None:
    """From rows to a GGUF that answers as the adapter does."""
    books("books", 4)
    command("train", "--data", "books/", *TINY, "--steps", "40", "--lr", "1e-2", "--out", "base")
    rows = ({"question": f"What is {n} plus {n}?", "answer": f" {n} plus {n} is {2 * n}."} for n in range(60))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    text = command("data", "inspect", "rows.jsonl", "--model", "base", code=2, says=("'question', 'answer'", "row 1"))
    check(" ".join(KEYS) in text, f"the error names the cure: {' '.join(KEYS)}", text)
    command("data", "inspect", "rows.jsonl", "--model", "base", *KEYS, says=("[[", "]]", "are trained on"))

    tune = ("finetune", "--model", "base", "--data", "rows.jsonl", *KEYS, "--rank", "8",
            "--set", "tune.template=chatml")  # fmt: skip
    command(*tune, "--steps", "40", "--lr", "2e-2", "--set", "optim.warmup=2", says=("reference:", "best validation"))
    found = [line["loss"] for line in lines(RUN)]
    check(found[-1] < found[0] - 1, "the loss of the answers falls", (found[0], found[-1]))
    adapter = json.loads(next(Path(RUN).glob("checkpoints/*/adapter_config.json")).read_text())
    check(adapter["r"] == 8, "--rank 8 is in the adapter", adapter)

    asked = ("--prompt", "What is 7 plus 7?", "--max-tokens", "8", "--temperature", "0")
    answer = command("generate", "--model", RUN, *asked)
    command("chat", "--model", "base", code=2, says=("template",))
    said = command("chat", "--model", RUN, "--max-tokens", "8", "--seed", "1", typed="What is 7 plus 7?\n")
    check(bool(said.strip()), "chat answers", said)

    command("convert", RUN, "out.gguf", code=2, says=("fuse",))
    check(not Path("out.gguf").exists(), "a refused conversion writes no file")
    command("fuse", "--model", RUN, "--out", "tuned")
    command("convert", "tuned", "tuned.gguf", says=("tuned.gguf", "parameters"))
    check(Path("tuned.gguf").read_bytes()[:4] == b"GGUF", "tuned.gguf is a GGUF")
    command("convert", "tuned.gguf", "back")
    command("verify", "tuned", "back", "--weights-only", says=("agrees",))
    text = command("generate", "--model", "back", *asked)
    check(text.splitlines()[0] == answer.splitlines()[0], "the file answers as the adapter does", (answer, text))


if __name__ == "__main__":
    sys.exit(main(walk))
