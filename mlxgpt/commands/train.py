"""The verb ``train``: everything that can be wrong is found before a folder is made or a run touched."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxgpt.common import recipes
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.data import token_source
from mlxgpt.common.data.fetch import CORPORA
from mlxgpt.common.data.prepare import cache_folder
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.model import families, params
from mlxgpt.common.plan import gate as plan_gate
from mlxgpt.common.recipes import apply_sets, build, read_toml
from mlxgpt.common.runs import checkpoint, run_folder
from mlxgpt.common.runs.checkpoint import RunState
from mlxgpt.common.tokenizers.load import KINDS, has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train import resume, session


def train(args: Namespace) -> int:
    """Starts a run, or goes on with one.

    Args:
        args: recipe, out, steps, stop_after, set, resume, init_from, moments, force, backend, device.

    Returns:
        0, or 130 and 143 after a signal.

    Raises:
        UserError: wrong usage or input; nothing was written.
        RunError: the run broke.
    """
    if args.moments and (args.resume or not args.init_from):
        raise UserError("--moments: expected --init-from DIR, whose optimizer's state it takes along")
    if not args.resume:
        return _begin(args)
    for flag, given in (("--out", args.out), ("--init-from", args.init_from)):
        if given:
            raise UserError(f"{flag} {given}: a resumed run stays where it is and goes on from its own weights")
    return _continue(args)


def _begin(args: Namespace) -> int:
    """A new run."""
    name = args.recipe or "pydocs"
    path = recipes.find(name)
    written = apply_sets(read_toml(path), args.set)
    recipe = _recipe(written, args.steps, str(path))
    out = run_folder.unused(Path(args.out) if args.out else None, path.stem)
    session.check_settings(recipe, args)
    backend = session.open_backend(args)
    origin = resolve.resolve_model(args.init_from) if args.init_from else None
    if args.moments and origin and not (origin / checkpoint.OPTIMIZER).is_file():
        raise UserError(f"--moments: {origin} has no {checkpoint.OPTIMIZER}")
    if origin:
        recipe = _take_model(recipe, written.get("model", {}), origin)

    source, tokenizer = token_source.open_data(recipe.data, recipe.model.block_size, recipe.train)
    if origin:
        _check_same_vocabulary(origin, recipe.model, tokenizer, source.vocab_size)
    recipe = _resolve(recipe, source, tokenizer)
    _check_sample(recipe, tokenizer)
    checkpoint.check_space(run_folder.existing(out), session.space(recipe))
    gate = plan_gate.gate(recipe, backend, args)
    weights = (
        model_folder.read_params(origin, recipe.model)
        if origin
        else params.init_params(recipe.model, recipe.train.seed)
    )
    engine = backend.engine.Engine(recipe, weights, device=args.device)

    state = session.fresh(recipe, source.digest, engine.describe())
    if origin and args.moments:
        _take_moments(origin, recipe, engine, state)
    elif origin and (origin / checkpoint.OPTIMIZER).is_file():
        print(f"{origin}: its optimizer's moments are left out; --moments goes on with them")
    if otherwise := families.mlx_lm_deviations(recipe.model):
        print(f"the checkpoints in mlx-lm: {'; '.join(otherwise)}")
    run_folder.make(out)
    with run_folder.locked(out):
        run_folder.begin(out, recipe, engine.describe() | {"data": source.statistics}, args.init_from, state.step)
        sample = _sampler(backend, engine, recipe, tokenizer)
        more = {"sample": sample, "save_first": origin is not None}
        return session.run(args, gate, out, recipe, engine, source, tokenizer, state, **more)


def _continue(args: Namespace) -> int:
    """A run that was stopped, from its newest checkpoint that holds."""
    run = Path(args.resume)
    resume.check_run(run)
    with run_folder.locked(run):
        stored = read_toml(run / "recipe.toml")
        if "tune" in stored:
            raise UserError(f"{run}: a run of mlxgpt finetune: mlxgpt finetune --resume {run} goes on with it")
        written = read_toml(recipes.find(args.recipe)) if args.recipe else stored
        recipe = _recipe(apply_sets(written, args.set), args.steps if args.steps else None, str(run / "recipe.toml"))
        if not recipe.model.vocab_size:
            vocab_size = stored.get("model", {}).get("vocab_size", 0)
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=vocab_size))
        going = session.find(args, run, recipe, stored)
        if going is None:
            return 0
        found, rounding = going
        backend = session.open_backend(args)
        recipe = _own_tokenizer(recipe, found[0] if found else None)
        source, tokenizer = token_source.open_data(recipe.data, recipe.model.block_size, recipe.train, run)
        _check_sample(recipe, tokenizer)
        gate = plan_gate.gate(recipe, backend, args)
        if found:
            resume.check_data(run, found[1].data, source.digest)
            snapshot = checkpoint.read(found[0], recipe.model)
            engine = backend.engine.Engine(recipe, snapshot["params"], device=args.device)
            state = session.go_on(run, found, snapshot, recipe, engine, rounding)
        else:
            _check_restart(run)
            print(f"{run}: no checkpoint yet: starts from step 1")
            weights = params.init_params(recipe.model, recipe.train.seed)
            engine = backend.engine.Engine(recipe, weights, device=args.device)
            state = session.fresh(recipe, source.digest, engine.describe())
        session.clear(run, recipe, engine.describe() | {"data": source.statistics}, state.step)
        sample = _sampler(backend, engine, recipe, tokenizer)
        return session.run(args, gate, run, recipe, engine, source, tokenizer, state, sample=sample)


def _recipe(sections: dict[str, dict[str, Any]], steps: int | None, where: str) -> Recipe:
    """The recipe that the sections and --steps make; paths in it become absolute, so that a run may move."""
    for section in ("tune", "adapter"):
        if section in sections:
            raise UserError(f"{where}: [{section}]: of mlxgpt finetune, which takes it with --config; expected [data]")
    if steps:
        sections = {**sections, "train": {**sections.get("train", {}), "steps": steps}}
    recipe = build(sections, where)
    paths = {"source": _corpus(recipe.data.source), "tokenizer": recipe.data.tokenizer}
    absolute = {
        key: str(Path(value).expanduser().resolve())
        for key, value in paths.items()
        if value not in ("pydocs", *KINDS) and Path(value).expanduser().exists()
    }
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **absolute))


def _corpus(source: str) -> str:
    """The source, or where ``data fetch`` put the corpus of that name."""
    if source not in CORPORA or Path(source).exists():
        return source
    fetched = cache_folder() / "corpora" / CORPORA[source].file
    if not fetched.is_file():
        raise UserError(
            f"data.source = {source!r}: not fetched yet: mlxgpt data fetch {source}, or give a file: "
            "--set data.source=FILE"
        )
    return str(fetched)


def _own_tokenizer(recipe: Recipe, place: Path | None) -> Recipe:
    """The recipe with the checkpoint's copy of a tokenizer that is not where it was; the data's sums judge it."""
    path = recipe.data.tokenizer
    if place is None or path in KINDS or Path(path).exists() or not has_tokenizer(place):
        return recipe
    print(f"data.tokenizer: {path} is gone; {place} has it")
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(place.resolve())))


def _take_model(recipe: Recipe, written: dict[str, Any], origin: Path) -> Recipe:
    """The recipe with the model, and where it trains none of its own the tokenizer, of ``origin``."""
    model = model_folder.read_config(origin)
    for key, value in written.items():
        taken = getattr(model, key)
        # 0 asks for what follows from the rest
        if value != taken and value != 0:
            print(f"model.{key}: {taken!r} from {origin}, not the recipe's {value!r}")
    changed: dict[str, Any] = {"model": model}
    if recipe.data.tokenizer in KINDS and has_tokenizer(origin):
        changed["data"] = dataclasses.replace(recipe.data, tokenizer=str(origin.resolve()))
        print(f"data.tokenizer: the one of {origin}, not a new {recipe.data.tokenizer}")
    return dataclasses.replace(recipe, **changed)


def _take_moments(origin: Path, recipe: Recipe, engine: Any, state: RunState) -> None:
    """The optimizer's state of ``origin`` in engine and ``state``: the run begins after its step.

    Raises:
        UserError: it is damaged, of another optimizer, or of a step that the recipe's schedule does not have.
    """
    snapshot = checkpoint.read(origin, recipe.model)
    there = checkpoint.verify(origin) if (origin / checkpoint.STATE).is_file() else None
    state.step = state.evaluated = there.step if there else snapshot["t"]
    if state.step >= recipe.train.steps:
        raise UserError(f"train.steps = {recipe.train.steps}: {origin} is after step {state.step}; expected more")
    engine.load_state(snapshot)
    state.t, state.tokens = snapshot["t"], there.tokens if there else 0
    before = there.recipe.get("optim", {}) if there else {}
    for key in ("beta1", "beta2", "eps", "weight_decay"):
        if before.get(key, getattr(recipe.optim, key)) != getattr(recipe.optim, key):
            print(f"optim.{key} = {getattr(recipe.optim, key)}, where {origin} was trained with {before[key]}")
    print(f"{origin}: goes on after step {state.step} with its optimizer's moments, {state.t} updates")


def _check_same_vocabulary(origin: Path, model: ModelConfig, tokenizer: Tokenizer | None, size: int) -> None:
    """Weights mean nothing under another tokenizer.

    Raises:
        UserError: the data's tokenizer is not the one of the weights, or has more tokens.
    """
    if tokenizer and has_tokenizer(origin):
        digest = load_tokenizer(origin).digest
        if digest != tokenizer.digest:
            raise UserError(
                f"--init-from {origin}: its tokenizer has sha256 {digest[:12]}..., "
                f"the data's {tokenizer.digest[:12]}...: expected the same vocabulary"
            )
    if size > model.vocab_size:
        raise UserError(f"--init-from {origin}: vocabulary of {model.vocab_size}, the data's has {size}")


def _resolve(recipe: Recipe, source: token_source.TokenSource, tokenizer: Tokenizer | None) -> Recipe:
    """The recipe with the vocabulary filled in, held against the data and what can be saved."""
    model, needed = recipe.model, source.vocab_size
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=needed)
    elif model.vocab_size < needed:
        raise UserError(f"model.vocab_size = {model.vocab_size}: expected 0 or at least the tokenizer's {needed}")
    elif model.vocab_size > needed:
        print(f"model.vocab_size = {model.vocab_size}: the tokenizer has {needed}, the other rows stay unused")
    families.config_to_hf(model)
    return dataclasses.replace(recipe, model=model)


def _check_sample(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """Finds a prompt that cannot be sampled from before the run does.

    Raises:
        UserError: the tokenizer cannot spell it, or it is longer than the context.
    """
    if not recipe.sample.max_tokens or tokenizer is None:
        return
    where = f"sample.prompt = {recipe.sample.prompt!r}"
    try:
        count = len(tokenizer.encode(recipe.sample.prompt))
    except UserError as error:
        raise UserError(f"{where}: {error}; set another, or sample.max_tokens=0") from None
    if count == 0 and tokenizer.eos_id is None:
        raise UserError(f"{where}: expected at least one token")
    if count > recipe.model.block_size:
        raise UserError(f"{where}: {count} tokens; expected at most model.block_size = {recipe.model.block_size}")


def _sampler(backend: Backend, engine: Any, recipe: Recipe, tokenizer: Tokenizer | None) -> Callable[[], str] | None:
    """What makes text that the model being trained writes; token ids where there is no tokenizer."""
    if not recipe.sample.max_tokens:
        return None

    def sample() -> str:
        try:
            if tokenizer is not None:
                return backend.generate.sample_text(engine.model, tokenizer, recipe.sample)
            return " ".join(map(str, backend.generate.generate(engine.model, None, [[0]], recipe.sample)[0].tokens))
        except RunError as error:
            return f"(none: {error})"

    return sample


def _check_restart(run: Path) -> None:
    """A run without a checkpoint can begin again, unless its weights came from elsewhere."""
    segments = run_folder.segments(run)
    if segments and segments[0].get("init_from"):
        raise UserError(
            f"{run}: no checkpoint: it was stopped before its weights, from {segments[0]['init_from']}, were saved; "
            "remove it and start again with --init-from"
        )
