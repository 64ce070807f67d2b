"""Decoding with drafts beside decoding without, and beside mlx_lm with a draft model: CPU seconds, the same tokens.

    python -m benchmarks.speculate [--rounds 5] [--tokens 96] [--size 10M] [--frameworks mlx torch] [--stories DIR]
                                   [--cases copy story batch draft ties] [--pair MODEL DRAFT] [--json]

The copying model is a llama of made weights: each of half of its tokens has one successor, so that it repeats a passage
of 40 tokens that its prompt has once, at any temperature; behind the other half anything may come of that half, which
is a text that never repeats itself. Its layers compute as any. 1M of the same successors drafts for it. A story is
stories260K's where --stories has stories260K.bin and tok512.bin; so is a text that copies, whose prompt holds a story
twice. --pair drafts with a model of yours for a larger one. ties counts the tokens that drafts change. Both sides run
in turn in one process on one thread; CPU time, which neighbors disturb least. Every round compares the tokens of both,
and says where they differ.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, finish

SIZES = {"10M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_hidden": 1024},
         "1M": {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_hidden": 344},
         "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_hidden": 96}}  # fmt: skip
VOCABULARY, PASSAGE = 2048, 40
FASTER, NO_SLOWER = "worse quartile >= 1.5", "worse quartile >= 0.95"
CASES = ("copy", "story", "batch", "draft", "ties")
Draw = Callable[[], tuple[int, list[list[int]]]]


def write_folder(folder: Path, size: str) -> None:
    """The copying model."""
    import numpy as np

    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params

    sizes = SIZES[size] | {"family": "llama", "vocab_size": VOCABULARY, "block_size": 1024, "tied": False}
    config = recipes.build({"model": sizes}).model
    weights, rng, half = params.init_params(config, 0), np.random.default_rng(0), VOCABULARY // 2
    wte = rng.normal(0, 1, (VOCABULARY, config.n_embd)).astype(np.float32)
    wte[:half, 0], wte[half:, 0] = -8, 8  # which half a token is of
    head = rng.normal(0, 0.02, wte.shape).astype(np.float32)
    for token in range(half // PASSAGE * PASSAGE):
        after = token + 1 if (token + 1) % PASSAGE else token + 1 - PASSAGE
        head[after] += 1.5 * wte[token] / np.linalg.norm(wte[token])
    head[:half, 0], head[half:, 0] = -4, 4
    weights |= {"wte.weight": wte, "lm_head.weight": head}
    write_model(folder, config, weights)


def prompts(rows: int, copying: int) -> list[list[int]]:
    """Of the rows the first so many copy; a passage each, one and a half times."""
    made = []
    for row in range(rows):
        first = row * PASSAGE if row < copying else VOCABULARY // 2 + row * PASSAGE
        passage = list(range(first, first + PASSAGE))
        made.append(passage + passage[: PASSAGE // 2])
    return made


class Side:
    """A model in one framework, with what draws from it."""

    def __init__(self, framework: str, folder: Path, draft: Path | None = None) -> None:
        from mlxgpt.common import backend as backends

        self.backend = backends.load(framework)
        self.model, self.tokenizer = self.backend.load.load(folder, device="cpu")
        self.backend.generate.prepare(self.model)
        self.draft = None
        if draft:
            self.draft, _ = self.backend.load.load(draft, device="cpu")
            self.backend.generate.prepare(self.draft)

    def plain(self, given: Sequence[Any], sample: Any) -> Draw:
        """As generate draws."""

        def run() -> tuple[int, list[list[int]]]:
            found = self.backend.generate.generate(self.model, self.tokenizer, given, sample)
            tokens = [each.tokens for each in found]
            return sum(map(len, tokens)), tokens

        return run

    def drafted(self, given: Sequence[Any], sample: Any, counts: list[Any] | None) -> Draw:
        """By the server's engine, with drafts: of the draft model, else of the text; without ``counts`` with none."""
        from mlxgpt.common.inference import generation
        from mlxgpt.common.inference.drafts import drafters
        from mlxgpt.common.inference.drafts.lookup import Lookup
        from mlxgpt.common.serve.alone import Alone, served_alone

        target = (self.model.config, self.tokenizer)
        make = drafters.of(self.backend, self.draft, target) if self.draft is not None else Lookup
        maker = None if counts is None else make

        def run() -> tuple[int, list[list[int]]]:
            rows = generation.start_rows(self.model.config, self.tokenizer, given, ())
            engine = Alone(self.backend, served_alone(self.model, self.tokenizer, rows[0].ends, maker), len(rows))
            tokens = [each.tokens for each in engine.generate(rows, sample, None, {})]
            if counts is not None:
                counts.append(engine.counts)
            return sum(map(len, tokens)), tokens

        return run


def mlx_lm(folder: Path, draft: Path, prompt: list[int], count: int) -> Draw:
    """mlx_lm's speculative decoding, greedy, drafts of 8."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    from mlx_lm.generate import speculative_generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.Device(mx.cpu))
    (model, _), (small, _) = load_model(folder), load_model(draft)

    def run() -> tuple[int, list[list[int]]]:
        steps = speculative_generate_step(mx.array(prompt), model, small, num_draft_tokens=8, max_tokens=count)
        return count, [[int(token) for token, *_ in steps]]

    return run


def race(what: str, against: str, ours: Draw, peer: Draw, rounds: int, goal: str, counts: list[Any]) -> Row:
    """In turn, after one round each that is not counted."""
    pairs = []
    for number in range(rounds + 1):
        rates, drawn = [], []
        for draw in (ours, peer) if number % 2 else (peer, ours):
            start = time.process_time()
            units, tokens = draw()
            rates.append(units / (time.process_time() - start))
            drawn.append(tokens)
        if drawn[0] != drawn[1]:
            print(f"{what}: other tokens than {against}", file=sys.stderr)
        if number:
            pairs.append(rates if number % 2 else rates[::-1])
    last = counts[-1]
    share = f"{last.accepted_tokens} of {last.drafted_tokens} accepted, {last.generated_tokens / last.steps:.1f} a step"
    ratios = [a / b for a, b in pairs]
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(f"{what} ({share})", against, "tok/s of CPU", mine, theirs, ratios, goal, 0, 0)


def stories_folder(stories: Path, place: Path) -> Path:
    """stories260K as a model folder."""
    folder = place / "stories"
    if not folder.exists():
        from convert.commands import convert_command  # noqa: F401  (only where the files are)
        from mlxgpt import cli

        words = ["convert", str(stories / "stories260K.bin"), str(folder), "--tokenizer", str(stories / "tok512.bin")]
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(words)
    return folder


def story(side: Side, rounds: int, count: int) -> list[Row]:
    """stories260K: a story, which says much twice, and a prompt that holds a story twice and begins it again."""
    from mlxgpt.common.config import SampleConfig

    begin, rows = "Once upon a time", []
    first = side.backend.generate.generate(
        side.model, side.tokenizer, [begin], SampleConfig(temperature=0, max_tokens=90)
    )
    told = begin + first[0].text
    for name, prompt, goal in (("a story", begin, NO_SLOWER), ("a story again", f"{told}\n{told}\n{begin}", FASTER)):
        for temperature in (0.0, 0.8):
            sample, counts = SampleConfig(temperature=temperature, max_tokens=count if prompt == begin else 90), []
            ours, peer = side.drafted([prompt], sample, counts), side.plain([prompt], sample)
            what = f"{side.backend.name} lookup, {name}, T {temperature:g}"
            rows.append(race(what, "without", ours, peer, rounds, goal, counts))
    return rows


def ties(side: Side, count: int) -> str:
    """Tokens that differ, of 8 texts of stories260K, where every match is drafted whether it pays or not."""
    from mlxgpt.common.config import SampleConfig
    from mlxgpt.common.inference.drafts import lookup, worth

    costs, least, compared, tried, found = worth.cost, lookup.SURE, 0, 0, []
    try:
        worth.cost, lookup.SURE = (lambda rows, width: 1.0), 0.0
        for temperature in (0.0, 0.8):
            sample, counts = SampleConfig(temperature=temperature, max_tokens=count), []
            given = ["Once upon a time", "The dog", "One day", "Lily", "Tom was", "She said", "In the park", "A big"]
            _, ours = side.drafted(given, sample, counts)()
            tried += counts[0].drafted_tokens
            # near ties end what can be compared: the rest of such a row follows another token
            results = side.backend.generate.generate(side.model, side.tokenizer, given, sample, top=2)
            for mine, result in zip(ours, results, strict=True):
                pairs = enumerate(zip(mine, result.tokens, strict=False))
                at = next((n for n, (a, b) in pairs if a != b), None)
                compared += len(mine) if at is None else at + 1
                if at is not None:
                    top = result.logprobs[at].top
                    found.append(
                        f"T {temperature:g}, token {at + 1}: the two likeliest {top[0][1] - top[1][1]:.1e} nats apart"
                    )
    finally:
        worth.cost, lookup.SURE = costs, least
    said = f"{side.backend.name}: {len(found)} of {compared} tokens differ, {tried} were drafted"
    return "; ".join([said, *found])


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of every case."""
    from mlxgpt.common.config import SampleConfig

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        small = "1M" if args.size == "10M" else "tiny"
        for size in {args.size, small}:
            write_folder(place / size, size)
        for framework in args.frameworks:
            plans = [(t, 1, 1, FASTER) for t in (0.0, 0.7, 1.0)] * ("copy" in args.cases)
            plans += [(0.7, 8, n, goal) for n, goal in ((8, FASTER), (1, NO_SLOWER), (0, NO_SLOWER))] * (
                "batch" in args.cases
            )
            side = Side(framework, place / args.size)
            for temperature, batch, copying, goal in plans:
                sample, counts = SampleConfig(temperature=temperature, max_tokens=args.tokens), []
                given = prompts(batch, copying)
                ours = side.drafted(given, sample, counts)
                # many rows of the engine beside many of it: generate reads their prompts otherwise
                peer = side.plain(given, sample) if batch == 1 else side.drafted(given, sample, None)
                what = f"{framework} lookup, {args.size}, {copying} of {batch} rows copy, T {temperature:g}"
                rows.append(race(what, "without", ours, peer, args.rounds, goal, counts))
            if {"story", "ties"} & {*args.cases} and (args.stories / "stories260K.bin").exists():
                side = Side(framework, stories_folder(args.stories, place))
                if "story" in args.cases:
                    rows += story(side, args.rounds, args.tokens)
                if "ties" in args.cases:
                    print(ties(side, args.tokens), file=sys.stderr)
            if "draft" in args.cases and args.pair:
                side = Side(framework, *args.pair)
                for temperature in (0.0, 1.0):
                    sample, counts = SampleConfig(temperature=temperature, max_tokens=args.tokens), []
                    ours, peer = side.drafted([args.prompt], sample, counts), side.plain([args.prompt], sample)
                    what = f"{framework} draft {args.pair[1].name} for {args.pair[0].name}, T {temperature:g}"
                    rows.append(race(what, "without", ours, peer, args.rounds, "", counts))
            elif "draft" in args.cases:
                side = Side(framework, place / args.size, place / small)
                for temperature in (0.0, 1.0):
                    sample, counts = SampleConfig(temperature=temperature, max_tokens=args.tokens), []
                    given = prompts(1, 1)
                    ours, peer = side.drafted(given, sample, counts), side.plain(given, sample)
                    what = f"{framework} draft {small} for {args.size}, T {temperature:g}"
                    rows.append(race(what, "without", ours, peer, args.rounds, "", counts))
                    if framework == "mlx" and not temperature:
                        peer = mlx_lm(place / args.size, place / small, given[0], args.tokens)
                        rows.append(race(what, "mlx_lm, draft_model", ours, peer, args.rounds, "aim at 1", counts))
    return rows


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens a row")
    parser.add_argument("--size", choices=["10M", "1M"], default="10M")
    parser.add_argument("--frameworks", nargs="+", choices=["mlx", "torch"], default=["mlx", "torch"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--stories", type=Path, default=Path(os.environ.get("MLXGPT_STORIES260K", "stories260K")))
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("MODEL", "DRAFT"), help="for the case draft")
    parser.add_argument("--prompt", default="Once upon a time", help="of a pair")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    finish(measure(args), args.json)


if __name__ == "__main__":
    main()
