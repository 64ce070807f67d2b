"""How fast text becomes tokens: characters against a Python dict loop, prepared BPE shards against `tokenizers`.

    python -m benchmarks.tokenizing [--rounds 9] [--megabytes 20] [--json]

The text is the standard library's sources in documents of 4 kB, the BPE has 4096 tokens. Our preparation is timed whole
as a user waits for it: reading the .jsonl twice, two processes from their start to their end, checksums and fsync;
`encode_batch` is timed as the call alone, on one thread.
"""

import argparse
import json
import shutil
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.pairs import Contender, race, row
from benchmarks.report import Row, finish

DOCUMENT = 4000  # characters
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def write_corpus(folder: Path, megabytes: int) -> None:
    """corpus.jsonl and a tokenizer trained on a twentieth of it."""
    from mlxgpt.common.tokenizers.load import train_tokenizer

    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            parts.append(path.read_text(encoding="utf-8", errors="ignore"))
            size += len(parts[-1])
        if size >= megabytes * 1e6:
            break
    text = "".join(parts)
    text *= -(-int(megabytes * 1e6) // len(text))
    documents = [text[start : start + DOCUMENT] for start in range(0, int(megabytes * 1e6), DOCUMENT)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    (folder / "tokenizer").mkdir()
    train_tokenizer("bpe", documents[::20], 4096).save(folder / "tokenizer")


def read_corpus(folder: str) -> tuple[list[str], int]:
    """The documents and their bytes."""
    lines = (Path(folder) / "corpus.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return documents, sum(len(document.encode()) for document in documents)


def characters(folder: str):
    """The character tokenizer."""
    from mlxgpt.common.tokenizers.load import train_tokenizer

    documents, size = read_corpus(folder)
    tokenizer = train_tokenizer("char", documents, 0)

    def run() -> float:
        tokenizer.encode_batch(documents)
        return size / 1e6

    return run


def dict_loop(folder: str):
    """nanoGPT's way: a dict and a list comprehension."""
    documents, size = read_corpus(folder)
    table = {c: i for i, c in enumerate(sorted(set("".join(documents))))}

    def run() -> float:
        for document in documents:
            [table[c] for c in document]
        return size / 1e6

    return run


def preparation(folder: str):
    """Shards made by two processes."""
    from mlxgpt.common.config import DataConfig
    from mlxgpt.common.data import prepare
    from mlxgpt.common.data.corpus import open_corpus
    from mlxgpt.common.tokenizers.load import load_tokenizer

    source, out = str(Path(folder) / "corpus.jsonl"), Path(folder) / "shards"
    _, size = read_corpus(folder)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        prepare.prepare(open_corpus(source), DataConfig(source=source, workers=2), out, tokenizer, lambda _: None)
        return size / 1e6

    return run


def encode_batch(folder: str):
    """`tokenizers`, everything in one call."""
    import tokenizers

    documents, size = read_corpus(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json"))

    def run() -> float:
        tokenizer.encode_batch(documents, add_special_tokens=False)
        return size / 1e6

    return run


def measure(rounds: int, megabytes: int) -> list[Row]:
    """Each comparison in turn."""
    me = "tokenizing"
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), megabytes)
        ours, loop = Contender("char", me, "characters", (folder,)), Contender("dict", me, "dict_loop", (folder,))
        race([ours, loop], rounds)
        shards = Contender("shards", me, "preparation", (folder,))
        batch = Contender("tokenizers", me, "encode_batch", (folder,), ONE_THREAD)
        race([shards, batch], rounds)
    return [
        row("characters", "a Python dict loop", "MB/s", ours, loop, "median >= 5"),
        row("BPE shards, 2 processes", "encode_batch, 1 thread", "MB/s", shards, batch, "median >= 2"),
    ]


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args.rounds, args.megabytes), args.json)


if __name__ == "__main__":
    main()
