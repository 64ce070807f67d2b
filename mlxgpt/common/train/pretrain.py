"""Pre-training as a kind of training: from a recipe, on a corpus, from fresh weights or those of a model."""

import dataclasses
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import recipes
from mlxgpt.common.batch import Engine
from mlxgpt.common.config import ModelConfig, OptimConfig, Recipe
from mlxgpt.common.data import token_source
from mlxgpt.common.data.fetch import CORPORA
from mlxgpt.common.data.prepare import cache_folder
from mlxgpt.common.data.token_source import TokenSource
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.folders.adapter_folder import is_adapter
from mlxgpt.common.model import families, params
from mlxgpt.common.recipes import apply_sets, build
from mlxgpt.common.runs import checkpoint, run_folder
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.load import KINDS, has_tokenizer, load_tokenizer, other_class
from mlxgpt.common.tokenizers.protocol import NAMES, Tokenizer
from mlxgpt.common.train import made, session, tasks
from mlxgpt.common.train.job import Job, Kind, Weights

Sections = dict[str, dict[str, Any]]

_FLAGS = {"data": "data.source", "lr": "optim.lr", "batch_size": "train.batch_size", "steps": "train.steps"}


class Pretraining(Kind[TokenSource]):
    """See job.Kind. ``args``: those of the verb train (mlxgpt/arguments/training.py)."""

    verb = "train"
    begin_only = ("out", "init_from", "size", "lr", "batch_size")
    source: TokenSource
    tokenizer: Tokenizer | None
    _origin: Path | None = None  # the model of --init-from
    _facts: made.Facts | None = None  # of the corpus that --data names, where no RECIPE was given
    _own: frozenset[str] = frozenset()  # keys that flags and --set set

    def __init__(self, args: Namespace):
        self.args = args

    def read_settings(self) -> tuple[Path | None, str]:
        """The recipe of RECIPE, or the one made for --data, with flags and --set."""
        args = self.args
        sets = recipes.flag_sets(args, _FLAGS) + args.set
        self._own = recipes.keys_of(sets)
        if args.recipe or not args.data:
            if args.size:
                raise UserError(
                    f"--size {args.size}: the model of a recipe that --data makes: expected --data, no RECIPE"
                )
            path = recipes.find(args.recipe or "pydocs")
            written, where, name = recipes.read(path), str(path), path.stem
        else:
            written, where, name = self._made(sets), "--data", ""
        if args.lr and "optim.min_lr" not in self._own:
            _keep_ratio(written, args.lr)
        if args.epochs:
            if args.steps or "train.steps" in self._own:
                raise UserError(f"--epochs {args.epochs:g} and --steps: expected one of them")
            if "data.sampling" not in self._own:
                written.setdefault("data", {})["sampling"] = "epoch"  # each token once an epoch
        self._written = apply_sets(written, sets)
        self.recipe = recipe_of(self._written, args.steps, where)
        if not args.epochs:  # the steps are known, or their most: a check before data is prepared
            if self._facts:
                self.recipe = made.with_length(self.recipe, 1 << 60, self._fixed, None)
            session.check_settings(self.recipe, args)
        given = "data.source" in self._own
        return Path(args.out) if args.out else None, made.name_of(self.recipe.data.source) if given else name

    @property
    def _fixed(self) -> frozenset[str]:
        """The keys that the user set."""
        return self._own | ({"train.steps"} if self.args.steps else set())

    def _made(self, sets: list[str]) -> Sections:
        """The sections of the recipe for --data, before flags and --set."""
        args = self.args
        if swallowed := [each for each in args.data if each in recipes.names() and not Path(each).exists()]:
            raise UserError(
                f"--data ... {swallowed[0]}: expected the recipe first: mlxgpt train {swallowed[0]} --data PATH"
            )
        if args.init_from and args.size:
            raise UserError(f"--size {args.size}: the model is the one of --init-from: expected one of the two")
        data = recipe_of(apply_sets({}, [item for item in sets if item.startswith("data.")]), None, "--data").data
        self._facts = made.measure(data)
        sections = made.sections(data, self._facts, args.size or made.DEFAULT)
        return {key: value for key, value in sections.items() if not (args.init_from and key == "model")}

    def open_model(self) -> None:
        """The model of --init-from."""
        self.init_from = self.args.init_from
        if not self.init_from:
            return
        self._origin = resolve.resolve_model(self.init_from)
        if is_adapter(self._origin):
            raise UserError(
                f"--init-from {self.init_from}: an adapter: expected a model; mlxgpt fuse --model {self.init_from} "
                "--out NEW makes one of it and its base"
            )
        if self.args.moments and not (self._origin / checkpoint.OPTIMIZER).is_file():
            raise UserError(f"--moments: {self._origin} has no {checkpoint.OPTIMIZER}")
        self.recipe = _with_model_of(self._origin, self.recipe, self._written.get("model", {}))

    def open_source(self) -> None:
        """The corpus, tokenized; the vocabulary's size follows from it."""
        self._open_data()
        if self._origin:
            check_same_vocabulary(self._origin, self.recipe.model, self.tokenizer, self.source)
        elif self.tokenizer:
            _check_class(self.recipe, self.tokenizer)
        self.recipe = with_vocabulary(self.recipe, self.source.vocab_size)
        self._follow_data()
        check_sample(self.recipe, self.tokenizer)

    def _follow_data(self) -> None:
        """What the corpus decides once its tokens are known: the length of the run, and what samples begin with."""
        args, recipe = self.args, self.recipe
        if self._facts:
            recipe = made.with_length(recipe, self.source.n_train_tokens, self._fixed, args.epochs)
        elif args.epochs:
            tokens = self.source.n_train_tokens
            steps = made.steps_of(args.epochs, tokens, recipe)
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))
            print(f"{steps:,} steps: {args.epochs:g} epochs of {tokens:,} tokens")
        if "data.source" in self._own and "sample.prompt" not in self._own and self.tokenizer:
            prompt = self._prompt(self.tokenizer)
            recipe = dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, prompt=prompt))
        self.recipe = recipe
        if self._facts:
            size, tokens = params.count(recipe.model), self.source.n_train_tokens
            self.reasons = tuple(made.told(recipe, self._facts, args.size or made.DEFAULT, tokens, size))
            print("\n".join(self.reasons))

    def _prompt(self, tokenizer: Tokenizer) -> str:
        """Words with which a validation text begins; the recipe's own prompt where they are none."""
        ids = [token for token in self.source.text("val", 400).tolist() if token != tokenizer.eos_id]
        found = made.prompt(tokenizer.decode(ids))
        while found and len(tokenizer.encode(found)) > self.recipe.model.block_size // 4:
            found = found[: len(found) // 2].strip()
        return found or self.recipe.sample.prompt

    def read_stored(self, run: Path, stored: Sections) -> None:
        """The run's recipe, or the one of RECIPE, with --set and --steps."""
        segments = run_folder.segments(run)
        self.init_from = segments[0].get("init_from") if segments else None
        args = self.args
        written = recipes.read(recipes.find(args.recipe)) if args.recipe else stored
        sets = recipes.flag_sets(args, {"data": "data.source", "steps": "train.steps"}) + args.set
        recipe = recipe_of(
            apply_sets(written, sets), args.steps or self._steps_of_epochs(run, stored), f"{run / 'recipe.toml'}"
        )
        if not recipe.model.vocab_size:
            vocab_size = stored.get("model", {}).get("vocab_size", 0)
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=vocab_size))
        self.recipe = recipe

    def _steps_of_epochs(self, run: Path, stored: Sections) -> int | None:
        """The length that --epochs means for a run, by the tokens that its environment.json counts."""
        if not self.args.epochs:
            return None
        segments = run_folder.segments(run)
        tokens = segments[0].get("data", {}).get("train_tokens", 0) if segments else 0
        if not tokens:
            raise UserError(
                f"--epochs {self.args.epochs:g}: {run} does not say how many tokens it has: expected --steps N"
            )
        return made.steps_of(self.args.epochs, tokens, build(stored))

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """The corpus; the run's own copy of shards or tokenizer stands in for one that is gone."""
        _check_there(run, self.recipe.data.source)
        self.recipe = _with_own_tokenizer(self.recipe, newest[0] if newest else None)
        self._open_data(run)
        check_sample(self.recipe, self.tokenizer)

    def _open_data(self, run: Path | None = None) -> None:
        recipe = self.recipe
        self.source, self.tokenizer = token_source.open_data(recipe.data, recipe.model.block_size, recipe.train, run)

    @property
    def seeded(self) -> bool:
        """Not where --init-from gave the first weights."""
        return not self.init_from

    def weights(self, place: Path | None) -> Weights:
        """Of a checkpoint, of --init-from, or drawn from the seed."""
        if place or self._origin:
            return dict(model_folder.read_params(place or self._origin, self.recipe.model))  # type: ignore[arg-type]
        return dict(params.init_params(self.recipe.model, self.recipe.train.seed))

    @property
    def spells(self) -> Tokenizer | None:
        """The data's tokenizer, if it has one."""
        return self.tokenizer

    def set_first_state(self, engine: Engine, state: RunState) -> None:
        """With --moments the optimizer's state of --init-from."""
        if self._origin and self.args.moments:
            _take_moments(self._origin, self.recipe, engine, state)
        elif self._origin and (self._origin / checkpoint.OPTIMIZER).is_file():
            print(f"{self._origin}: its optimizer's moments are left out; --moments takes them along")
        if differences := families.mlx_lm_deviations(self.recipe.model):
            own = families.family_of(self.recipe.model).own
            print(f"the checkpoints{'' if own else ' in mlx-lm'}: {'; '.join(differences)}")

    def describe_source(self) -> dict[str, Any]:
        """Tokens of each split."""
        return self.source.statistics

    def write_weights(self, place: Path, trained: dict[str, np.ndarray]) -> None:
        """A model folder."""
        model_folder.write_model(place, self.recipe.model, trained, tokenizer=self.tokenizer)

    def sample(self, job: Job) -> str | None:
        """What follows sample.prompt; token ids where there is no tokenizer."""
        generate, settings = job.backend.generate, self.recipe.sample
        if not settings.max_tokens:
            return None
        try:
            if self.tokenizer is not None:
                return generate.sample_text(job.engine.model, self.tokenizer, settings)
            return " ".join(map(str, generate.generate(job.engine.model, None, [[0]], settings)[0].tokens))
        except RunError as error:
            return f"(none: {error})"

    def trial(self, run: Path) -> str:
        """Documents are continued, also where the first weights came with a chat template; ids without a tokenizer."""
        place = shlex.quote(str(run))
        if self.tokenizer is None:
            return f"generate --model {place} --prompt-ids IDS"
        return f"generate --model {place} {'--raw ' if self.tokenizer.templates else ''}--prompt TEXT"


def _keep_ratio(written: Sections, lr: float) -> None:
    """Lowers min_lr of a recipe as --lr does lr."""
    optim = written.setdefault("optim", {})
    peak, low = (optim.get(key, OptimConfig.__dict__[key]) for key in ("lr", "min_lr"))
    if all(isinstance(rate, (int, float)) and rate > 0 for rate in (peak, low)):
        optim["min_lr"] = float(f"{lr * low / peak:.6g}")
    if optim.get("name") == "muon":
        print("--lr: of AdamW; the matrices that Muon trains keep optim.muon_lr")


def recipe_of(sections: Sections, steps: int | None, where: str) -> Recipe:
    """The recipe that the sections and --steps make; paths in it become absolute, so that a run may move.

    Raises:
        UserError: a section of fine-tuning, an unknown key, a wrong value, or a corpus that was not fetched.
    """
    for section in ("tune", "adapter"):
        if section in sections:
            raise UserError(f"{where}: [{section}]: of mlxgpt finetune, which takes it with --config; expected [data]")
    if steps:
        sections = {**sections, "train": {**sections.get("train", {}), "steps": steps}}
    recipe = build(sections, where)
    if not isinstance(recipe.data.source, str):
        places = tuple(str(Path(place).expanduser().resolve()) for place in recipe.data.source)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=places))
    source = recipe.data.source
    paths = {"source": _corpus(source) if isinstance(source, str) else "", "tokenizer": recipe.data.tokenizer}
    absolute = {
        key: str(Path(value).expanduser().resolve())
        for key, value in paths.items()
        if value not in ("", "pydocs", *KINDS, *NAMES) and Path(value).expanduser().exists()
    }
    data, train = (dataclasses.replace(recipe.data, **absolute), tasks.absolute(recipe.train))
    return dataclasses.replace(recipe, data=data, train=train)


def with_vocabulary(recipe: Recipe, needed: int) -> Recipe:
    """The recipe with a vocabulary of at least the ``needed`` entries.

    Raises:
        UserError: model.vocab_size is smaller, or no Hugging Face architecture can hold the model.
    """
    model = recipe.model
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=needed)
    elif model.vocab_size < needed:
        raise UserError(f"model.vocab_size = {model.vocab_size}: expected 0 or at least the tokenizer's {needed}")
    elif model.vocab_size > needed:
        print(f"model.vocab_size = {model.vocab_size}: the tokenizer has {needed}, the other entries stay unused")
    families.config_to_hf(model)
    return dataclasses.replace(recipe, model=model)


def _corpus(source: str) -> str:
    """The source, or where ``data fetch`` put the corpus of that name."""
    if source not in CORPORA or Path(source).exists():
        return source
    fetched = cache_folder() / "corpora" / CORPORA[source].file
    if not fetched.is_file():
        raise UserError(
            f"data.source = {source!r}: not fetched yet: mlxgpt data fetch {source}, or give a file: --data FILE"
        )
    return str(fetched)


def _check_there(run: Path, source: str | tuple) -> None:
    """Refuses a path that is not on this machine, unless the run carries its shards.

    Raises:
        UserError: says how the data comes here.
    """
    places = [source] if isinstance(source, str) else source
    gone = [place for place in places if Path(place).is_absolute() and not Path(place).exists()]
    if gone and not (run / "data").exists():
        raise UserError(
            f"{run}: its data is not here: {gone[0]}: no such file or folder; --data PATH says where it is now, "
            "mlxgpt data export RUN packs it where it is"
        )


def _with_own_tokenizer(recipe: Recipe, place: Path | None) -> Recipe:
    """The recipe with the checkpoint's copy of a tokenizer that is gone; the data's checksums judge it."""
    path = recipe.data.tokenizer
    if place is None or path in (*KINDS, *NAMES) or Path(path).exists() or not has_tokenizer(place):
        return recipe
    print(f"data.tokenizer: {path} is gone; {place} has it")
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(place.resolve())))


def _with_model_of(origin: Path, recipe: Recipe, written: dict[str, Any]) -> Recipe:
    """The recipe with the model of ``origin``, and with its tokenizer where the recipe would train a new one."""
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


def _take_moments(origin: Path, recipe: Recipe, engine: Engine, state: RunState) -> None:
    """Puts the optimizer's state of ``origin`` into engine and ``state``: the run begins after its step.

    Raises:
        UserError: it is damaged, of another optimizer, or of a step that the recipe's schedule does not have.
    """
    snapshot = checkpoint.read_snapshot(origin, recipe.model)
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
    print(f"{origin}: starts after step {state.step} with its optimizer's moments, {state.t} updates")


def check_same_vocabulary(origin: Path, model: ModelConfig, tokenizer: Tokenizer | None, source: Any) -> None:
    """Weights mean nothing under another tokenizer; says where it begins documents otherwise.

    Raises:
        UserError: the data's tokenizer is not the one of the weights, or has more tokens.
    """
    if tokenizer and has_tokenizer(origin):
        own = load_tokenizer(origin)
        if own.digest != tokenizer.digest:
            raise UserError(
                f"--init-from {origin}: its tokenizer has sha256 {own.digest[:12]}..., "
                f"the data's {tokenizer.digest[:12]}...: expected the same vocabulary"
            )
        if own.before != tokenizer.before:
            source.compare_beginnings(own, str(origin), print)
    if source.vocab_size > model.vocab_size:
        raise UserError(f"--init-from {origin}: vocabulary of {model.vocab_size}, the data's has {source.vocab_size}")


def _check_class(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuses a family with which transformers would read the tokenizer otherwise than it was trained with.

    Raises:
        UserError: as qwen2 with any tokenizer but Qwen2's.
    """
    found = other_class(tokenizer, recipe.model.family)
    if found:
        raise UserError(
            f"model.family = {recipe.model.family!r}: transformers reads this tokenizer beside it as {found}, "
            "which gives other ids: expected another family, such as qwen3"
        )


def check_sample(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """Refuses a prompt that cannot be sampled from before the run starts.

    Raises:
        UserError: the tokenizer cannot spell it, or it is longer than the context.
    """
    if not recipe.sample.max_tokens or tokenizer is None:
        return
    where = f"sample.prompt = {recipe.sample.prompt!r}"
    try:
        count = len(beginning.start(tokenizer, recipe.sample.prompt))
    except UserError as error:
        raise UserError(f"{where}: {error}; set another, or sample.max_tokens=0") from None
    if count == 0 and tokenizer.eos_id is None:
        raise UserError(f"{where}: expected at least one token")
    if count > recipe.model.block_size:
        raise UserError(f"{where}: {count} tokens; expected at most model.block_size = {recipe.model.block_size}")
