"""The verb ``eval``: loss, perplexity and bits per byte of data, and scores on tasks."""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes
from mlxgpt.common.align.rl import win_rate, writing
from mlxgpt.common.align_config import RLConfig
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import rows as evaluation_rows
from mlxgpt.common.evaluate.score import evaluate, evaluate_rows
from mlxgpt.common.evaluate.text import open_text
from mlxgpt.common.files import atomic_write
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.model import rotary
from mlxgpt.common.rows.files import read_values
from mlxgpt.common.sft.template import template_of
from mlxgpt.common.tasks import code, compare, named, requests, shots, show
from mlxgpt.common.tasks.scorer import ModelScorer
from mlxgpt.common.tasks.task import Outcome, Task
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.user_code import limited

_DATA = ("text_key", "split", "set", "stride")  # flags of --data without --task
_KEPT = {"files": "files outside their folder", "processes": "other processes"}
_JUDGED = ("shots", "log", "bos", "chat", "data", "kv_bits", "task")  # flags that --prompts has no use for
_TASKS = ("limit", "shots", "log", "against", "run_code", "draws", "max_tokens", "bos", "chat")


def evaluate_command(args: argparse.Namespace) -> int:
    """Prints loss, perplexity and bits per byte of --data, or scores on each --task, as lines or as one JSON object."""
    if args.prompts:
        return _judged(args)
    if args.reward:
        raise UserError("--reward: expected --prompts FILE, whose answers it judges")
    needed, others = ("--task", _DATA) if args.task else ("--data without --task", _TASKS)
    for name in others:
        value = getattr(args, name)
        if value not in (None, []) and value is not False:
            raise UserError(f"--{name.replace('_', '-')}: does nothing with {needed}")
    if args.task:
        return _tasks(args)
    if not args.data:
        raise UserError("expected --data PATH, --task FILE.jsonl, FILE.yaml or NAME, or --prompts FILE with --reward")
    return _data(args)


def _tasks(args: argparse.Namespace) -> int:
    tasks = _with_draws(_with_length(named.read_all(args.task, args.data, args.shots), args.max_tokens), args)
    _check_log(args.log)
    for task in tasks:  # examples that are missing are refused before a model is loaded
        shots.before(task, requests.first(task, args.limit))
    earlier = _read_log(args, tasks) if args.against and Path(args.against).is_file() else {}
    if args.against and not earlier:
        base_and_adapters.find_base(args.against)  # one that is not there is refused before the first is asked
    backend = backends.load(args.backend)
    asked = _ask(args, tasks, backend, args.model, base_and_adapters.parse_adapters(args.adapter) or None)
    if args.log:
        with atomic_write(Path(args.log)) as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in asked.logged)
    others = earlier
    if args.against and not earlier:
        others = {each.task: each.each for each in _ask(args, tasks, backend, args.against, None).outcomes}
    apart = {each.task: compare.compare(each.each, others[each.task]) for each in asked.outcomes if others}
    if args.json:
        found: dict[str, Any] = {"tasks": {outcome.task: show.described(outcome) for outcome in asked.outcomes}}
        for name, differences in apart.items():
            found["tasks"][name]["against"] = {key: dataclasses.asdict(each) for key, each in differences.items()}
        print(json.dumps({**found, "limit": args.limit, **beginning.described(asked.tokenizer, asked.begins)}))
        return 0
    for outcome in asked.outcomes:
        if outcome.task in apart:
            names = args.model, args.against
            print("\n".join(compare.lines(apart[outcome.task], outcome.task, outcome.questions, names)))
    print(f"begins with    {beginning.shown(asked.tokenizer, asked.begins)}")
    return 0


def _check_log(name: str | None) -> None:
    """Refuses a --log that could not be written, or not be read by --against."""
    if name is None:
        return
    path = Path(name)
    if path.exists():
        raise UserError(f"--log {name}: exists already: expected a new file")
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"--log {name}: expected a .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--log {name}: no such folder: {path.parent}")


class _Asked(NamedTuple):
    """What a model said to every task."""

    outcomes: list[Outcome]
    logged: list[dict[str, object]]
    tokenizer: Tokenizer
    begins: list[int]


def _ask(
    args: argparse.Namespace, tasks: Sequence[Task], backend: backends.Backend, path: str, adapters: Any
) -> _Asked:
    """Loads a model and asks it; prints what came of each task, unless --json."""
    model, tokenizer = backend.load.load(path, adapter=adapters, device=args.device, force=args.force)
    base_and_adapters.expect_task(model.config, path)
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, path)
    kv_cache.group_size(model.config.head_dim, args.kv_bits)
    render = _render(tokenizer, path) if args.chat else None
    scorer = ModelScorer(backend, model, tokenizer, args.bos or "auto", render, kv_bits=args.kv_bits)
    made = _Asked([], [], tokenizer, scorer.begins_with)
    for task in tasks:
        with _progress(args, f"{task.name}: ") as say:
            run = functools.partial(limited.run_all, say=say) if args.run_code else None
            made.outcomes.append(requests.ask(task, scorer, args.limit, say, made.logged.append, run))
        if not args.json:
            print("\n".join([path] * bool(args.against) + show.lines(made.outcomes[-1])), flush=True)
    return made


def _render(tokenizer: Tokenizer, path: str) -> Callable[[str], str]:
    """What the chat template makes of a question, up to where the answer begins."""
    template = template_of(tokenizer, path)
    if template is None:
        raise UserError(f"--chat: {path} has no chat template: expected a model that was tuned on conversations")
    return lambda text: template.render([{"role": "user", "content": text}], generation=True)


def _with_length(tasks: list[Task], most: int | None) -> list[Task]:
    """The tasks, those that are answered by writing with --max-tokens."""
    if most and not any(task.kind in ("answer", "code") for task in tasks):
        raise UserError(f"--max-tokens {most}: no task here has answers to write")
    samples = [dataclasses.replace(task.sample, max_tokens=most or task.sample.max_tokens) for task in tasks]
    return [dataclasses.replace(task, sample=sample) for task, sample in zip(tasks, samples, strict=True)]


def _with_draws(tasks: list[Task], args: argparse.Namespace) -> list[Task]:
    """The tasks, those of code with --draws; refuses those without --run-code, and flags that none of them needs."""
    of_code = [task for task in tasks if task.kind == "code"]
    for name, given in (("--run-code", args.run_code), ("--draws", args.draws)):
        if given and not of_code:
            raise UserError(f"{name}: no task here has programs to run: expected such as --task humaneval")
    if of_code:
        closed = limited.check() if args.run_code else ()
        code.expect_run(limited.run_all if args.run_code else None, of_code[0].name)
        kept = " and ".join(f"{_KEPT[each]}" for each in closed) or "nothing: docs/evaluate.md says what still does"
        sample = SampleConfig(temperature=0.8, top_p=0.95)
        for at, task in enumerate(tasks):
            if task.kind == "code":
                draws = args.draws or task.draws
                drawn = dataclasses.replace(sample, max_tokens=task.sample.max_tokens) if draws > 1 else task.sample
                notes = (*task.notes, f"programs were run; the kernel kept them from {kept}")
                tasks[at] = dataclasses.replace(task, draws=draws, sample=drawn, notes=notes)
                code.check_draws(tasks[at])
    return tasks


def _read_log(args: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, dict[str, np.ndarray]]:
    """Task -> its values by question in the log of --against, whose questions must be those of the tasks."""
    if Path(args.against).suffix.lower() != ".jsonl":
        raise UserError(f"--against {args.against}: expected a model, or a .jsonl that --log wrote")
    rows = [row for _, row in read_values(Path(args.against))]
    found = {}
    for task in tasks:
        questions = requests.first(task, args.limit)
        asked = list(map(compare.digest, questions, shots.before(task, questions)))
        digests, found[task.name] = compare.logged(rows, task.name, args.against)
        compare.expect_same(asked, digests, (args.model, args.against), task.name)
    return found


def _judged(args: argparse.Namespace) -> int:
    """Prints what the answers to --prompts are rewarded with, and how often they beat those of --against."""
    for name in (*_JUDGED, *_DATA):
        if getattr(args, name) and name != "set":
            raise UserError(f"--{name.replace('_', '-')}: does nothing with --prompts")
    rl = {"rewards": list(args.reward), "max_tokens": args.max_tokens or RLConfig().max_tokens}
    sections = recipes.apply_sets({"tune": {"source": args.prompts}, "rl": rl}, args.set)
    recipe = recipes.build(sections, "--set")
    assert recipe.rl and recipe.tune
    backend = backends.load(args.backend)
    found = []
    with contextlib.closing(writing.open_rewards(backend, recipe.rl, args.device, args.run_code)) as rewards:
        given = base_and_adapters.parse_adapters(args.adapter) or None
        if args.against:
            base_and_adapters.find_base(args.against)
        for place, adapters in ((args.model, given), *([(args.against, None)] if args.against else ())):
            with _progress(args, f"{place}: ") as say:
                told = (lambda line: None) if args.json else functools.partial(print, file=sys.stderr)
                writer = writing.Writer(backend, place, adapters, args.device, args.force, recipe.tune, recipe.rl, told)
                found.append(win_rate.answer(place, writer, rewards, args.draws or 1, args.limit, say))
    if found[0].asked != found[-1].asked:
        raise UserError(
            f"{args.against}: its context has room for other prompts: expected shorter ones or --max-tokens"
        )
    apart = win_rate.win_rate(*found) if len(found) > 1 else None
    if args.json:
        print(json.dumps({"answers": [each.described() for each in found], "win_rate": apart}))
    else:
        print("\n".join(win_rate.lines(found, apart)))
    return 0


def _data(args: argparse.Namespace) -> int:
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    config = model.config
    base_and_adapters.expect_task(config, args.model)
    stride = args.stride or config.block_size
    if stride > config.block_size:
        raise UserError(
            f"--stride {stride}: expected at most model.block_size = {config.block_size}, or tokens would be skipped"
        )
    kv_cache.group_size(config.head_dim, args.kv_bits)
    rows = evaluation_rows.is_rows(args.data, args.text_key or "text") or bool(args.set)

    def score(tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
        positions = positions if rotary.by_length(config) else None
        return backend.generate.score(model, tokens, targets, positions, args.kv_bits)

    with _progress(args) as say:
        if rows:
            examples = evaluation_rows.examples(
                evaluation_rows.settings(args.data, args.set), args.split or "val", tokenizer, config
            )
            before = beginning.shared(tokenizer, [each.tokens for each in examples])
            batches = evaluation_rows.batches(examples, config.block_size)
            result = evaluate_rows(score, batches, args.data, say)
        else:
            text = open_text(args.data, tokenizer, args.text_key or "text", args.split or "val")
            before = list(text.begins_with)
            result = evaluate(score, text, config.vocab_size, config.block_size, stride, say)
    bits = result.bits_per_byte
    if args.json:
        values = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": bits, "tokens": result.tokens}
        values |= {"bytes": result.size, "block_size": config.block_size, "stride": stride}
        print(json.dumps({**values, **beginning.described(tokenizer, before)}))
        return 0
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"bits per byte  {f'{bits:.4f}' if bits is not None else 'unknown: fine-tuning examples, or no tokenizer'}")
    how = "those of answers" if rows else f"each scored once, in windows of {config.block_size} every {stride}"
    print(f"tokens         {result.tokens}, {how}")
    print(f"begins with    {beginning.shown(tokenizer, before)}")
    return 0


@contextlib.contextmanager
def _progress(args: argparse.Namespace, about: str = "") -> Iterator[Callable[[str], None]]:
    """Tells a terminal how far it is, in one line that is renewed."""
    live = sys.stderr.isatty() and not args.json

    def say(progress: str) -> None:
        if live:
            print(f"\r{about}{progress}\033[K", end="", file=sys.stderr, flush=True)

    yield say
    if live:
        print(file=sys.stderr)
