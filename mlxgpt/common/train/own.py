"""Training from a program: the loop of ``mlxgpt train``, with the program's own batches or objective where it has any.

mlxgpt/api.py and torch_ref/api.py give ``Trainer`` its framework.
"""

import contextlib
import dataclasses
import io
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

from mlxgpt.common import recipes
from mlxgpt.common.batch import Engine
from mlxgpt.common.config import DataConfig, Recipe
from mlxgpt.common.errors import RunError, UserError, nearest
from mlxgpt.common.failures import doing
from mlxgpt.common.folders import resolve
from mlxgpt.common.keys import or_list
from mlxgpt.common.recipes import SECTIONS, build
from mlxgpt.common.runs import checkpoint, metrics, run_folder
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.tokenizers.load import has_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer, expect_own
from mlxgpt.common.train import loop, pretrain, session
from mlxgpt.common.train.given import Given, batches_of
from mlxgpt.common.train.pretrain import Pretraining, Sections

_KEYS = [f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)]
OWN = "(a program's own batches)"
"""What recipe.toml names as the source of such a run."""


class Own(Pretraining):
    """See job.Kind: pre-training from a recipe that a program has."""

    ends_at_second = False

    def __init__(self, args: Namespace, trainer: "Trainer"):
        super().__init__(args)
        self._trainer, self.objective = trainer, trainer.objective
        self.own = tuple(name for name in ("source", "objective") if getattr(trainer, name) is not None)

    def read_settings(self) -> tuple[Path | None, str]:
        """The trainer's recipe."""
        self._written, self.recipe = self._trainer.sections, self._trainer.recipe
        session.check_settings(self.recipe, self.args)
        return self._trainer.run, self._trainer.run.name

    def read_stored(self, run: Path, stored: Sections) -> None:
        """The trainer's recipe, with what the run's has from its data or its first model."""
        segments, before = run_folder.segments(run), build(stored, str(run / "recipe.toml"))
        self.init_from = segments[0].get("init_from") if segments else None
        recipe = self._trainer.recipe
        if self.init_from:
            recipe = dataclasses.replace(recipe, model=before.model, data=before.data)
        elif not recipe.model.vocab_size:
            model = dataclasses.replace(recipe.model, vocab_size=before.model.vocab_size)
            recipe = dataclasses.replace(recipe, model=model)
        self.recipe = recipe

    def open_source(self) -> None:
        """The recipe's corpus, or the program's batches."""
        if self._trainer.source is None:
            super().open_source()
        else:
            self._take(self._origin)

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """The same for a run that resumes."""
        if self._trainer.source is None:
            super().reopen_source(run, newest)
        else:
            self._take(newest[0] if newest else None)

    def _take(self, place: Path | None) -> None:
        """The program's batches; a tokenizer that it does not give is the one of ``place``, if it has any."""
        given, model = self._trainer.tokenizer, self.recipe.model
        self.tokenizer = resolve.resolve_tokenizer(given) if isinstance(given, (str, Path)) else given
        if self.tokenizer is None and place and has_tokenizer(place):
            self.tokenizer = resolve.resolve_tokenizer(place)
        expect_own(self.tokenizer)
        if not model.vocab_size and self.tokenizer is None:
            raise UserError(
                "model.vocab_size = 0: expected the number of tokens, for there is no tokenizer that has it"
            )
        self.recipe = pretrain.with_vocabulary(
            self.recipe, self.tokenizer.n_vocab if self.tokenizer else model.vocab_size
        )
        self.source = Given(self._trainer.source, self._trainer.validation, self.recipe)  # type: ignore[assignment]
        if self._origin and self.tokenizer:
            pretrain.check_same_vocabulary(self._origin, self.recipe.model, self.tokenizer, self.source)
        if self.recipe.train.eval_every and not self.source.statistics["val_batches"]:  # type: ignore[attr-defined]
            raise UserError(
                f"train.eval_every = {self.recipe.train.eval_every}, and no validation batches: expected validation=, "
                "or train.eval_every = 0"
            )
        pretrain.check_sample(self.recipe, self.tokenizer)

    def set_first_state(self, engine: Engine, state: RunState) -> None:
        """Tries an objective of the program's own on the first rows, before anything is written."""
        super().set_first_state(engine, state)
        if self.objective:
            with doing("the objective, on the first batch"):
                engine.evaluate(self.source.batch(1).split(self.recipe.train.micro_batch_size)[0])

    def describe_source(self) -> dict[str, Any]:
        """The source's statistics, and what is the program's."""
        named = {name: _name_of(getattr(self._trainer, name)) for name in self.own}
        return {**self.source.statistics, **({"own": named} if named else {})}

    def again(self, run: Path) -> str:
        """The call that resumes the run."""
        return f"Trainer(..., out={str(run)!r}).train()"


class Trainer:
    """One training run in a folder, from a program: the loop of ``mlxgpt train``, with exact resume.

    The folder is that of the command (docs/runs.md), so ``mlxgpt report``, ``generate``, ``runs`` and ``load`` read it.

    Args:
        recipe: a shipped recipe's name, a .toml file, a dict of sections such as ``{"model": {"n_layer": 2}}``, or a
            Recipe.
        out: the run folder: made by the first ``train``; what it holds is continued by the next.
        source: batches of one's own: a function from the step (from 1) to the batch, or an object with such a method
            ``batch`` (and ``validation``, ``digest``). It must give the same batch for the same step each time. A batch
            is (tokens, targets), (tokens, targets, weights) or a Batch, of arrays or lists (B, T); B is
            train.batch_size; weights of 0 mark what is no target. None: the recipe's data.
        validation: batches to validate on: a list of them, or a function that returns one.
        objective: ``objective(model, batch)`` returns losses (B, T), one a target, in the framework's arrays, from
            batch.tokens, batch.targets, batch.weights, batch.positions and batch.segments. The step minimizes their
            mean by the weights; validation reports the same objective. None: the cross-entropy of the next token.
        tokenizer: of one's own batches: a Tokenizer, or the folder or file of one; it is saved beside the model and
            decodes samples. With the recipe's data, data.tokenizer says it.
        init_from: a run, checkpoint or model folder whose weights the run starts from.
        settings: keys that differ from the recipe's, such as ``{"train.steps": 200, "optim.lr": 3e-4}``.
        device: as ``load`` takes it.
        force: start even if memory is predicted not to suffice.
        quiet: print nothing.

    Raises:
        UserError: the recipe, a setting or an argument is wrong; nothing was written.
    """

    backend: ClassVar[str]
    """mlx or torch."""

    def __init__(
        self,
        recipe: "str | Path | Mapping[str, Mapping[str, Any]] | Recipe",
        out: str | Path,
        *,
        source: Any = None,
        validation: Any = None,
        objective: Callable[[Any, Any], Any] | None = None,
        tokenizer: "Tokenizer | str | Path | None" = None,
        init_from: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "auto",
        force: bool = False,
        quiet: bool = False,
    ):
        with _in_python():
            self.sections = _sections(recipe, {} if settings is None else settings)
        if not isinstance(out, (str, Path)):
            raise UserError(f"out is a {type(out).__name__}: expected the run folder, as str or Path")
        self.run = Path(out)
        self.source, self.validation, self.objective, self.tokenizer = source, validation, objective, tokenizer
        self._init_from, self._device, self._force, self._quiet = init_from, device, force, quiet
        if source is not None:
            batches_of(source)
        for name in () if source is not None else ("validation", "tokenizer"):
            if getattr(self, name) is not None:
                raise UserError(f"{name}: only with source: the recipe's data have their own")
        if objective is not None and not callable(objective):
            raise UserError(f"objective is a {type(objective).__name__}: expected a function of model and batch")
        with _in_python():
            made = pretrain.recipe_of(self.sections, None, "recipe")
        if source is not None:
            made = dataclasses.replace(made, data=DataConfig(source=OWN, tokenizer=OWN))
            validates = validation is not None or hasattr(source, "validation")
            if not validates and "eval_every" not in self.sections.get("train", {}):
                made = dataclasses.replace(made, train=dataclasses.replace(made.train, eval_every=0))
        self.recipe: Recipe = made
        """Every setting."""

    def train(self, stop_after: int = 0) -> bool:
        """Begins the run, or goes on from its newest checkpoint, to the end of the schedule.

        Ctrl-C, or a notebook's interrupt, ends it after the step, saves and raises KeyboardInterrupt; ``train`` again
        goes on. A second one interrupts the step itself; then the last checkpoint is what remains.

        Args:
            stop_after: save after this step and return; 0 for the end.

        Returns:
            Whether the schedule is finished, or early stopping ended it.

        Raises:
            UserError: wrong input; nothing was written. A run whose recipe, data or checkpoint do not fit is refused.
            RunError: the run broke: three steps in a row were not finite, a tensor does not train, memory lacked, or a
                checkpoint cannot be written. The message names the last good checkpoint.
            KeyboardInterrupt: it was interrupted, and saved.
            SystemExit: SIGTERM came, with 143; it was saved.
        """
        if not isinstance(stop_after, Integral) or stop_after < 0:
            raise UserError(f"stop_after = {stop_after!r}: expected a step, or 0 for the end")
        resumes = resolve.is_run(self.run)
        args = Namespace(
            recipe=None, data=None, size=None, lr=None, batch_size=None, epochs=None, set=[], steps=None, moments=False,
            backend=self.backend, device=self._device,
            out=None if resumes else str(self.run), resume=str(self.run) if resumes else None,
            init_from=None if resumes or self._init_from is None else str(self._init_from),
            stop_after=stop_after, force=self._force,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()) if self._quiet else contextlib.nullcontext(), _in_python():
            code = session.run(Own(args, self))
        if code == 130:
            raise KeyboardInterrupt(f"{self.run}: stopped and saved; train() again goes on")
        if code:
            raise SystemExit(code)
        return self.finished

    @property
    def step(self) -> int:
        """Steps that the newest checkpoint is after; 0 where there is none."""
        place = resolve.follow(self.run, "last")
        return checkpoint.verify(place).step if place else 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        place = resolve.follow(self.run, "last")
        return bool(place and loop.finished(self.recipe, checkpoint.verify(place)))

    def metrics(self, split: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: step, split (train or val), loss and what else was measured; of a split alone."""
        path = self.run / metrics.FILE
        lines = metrics.read_lines(path) if path.is_file() else ()
        return [line for line in lines if split in (None, line.get("split"))]

    def __repr__(self) -> str:
        state = f"step {self.step} of {self.recipe.train.steps}" if resolve.is_run(self.run) else "not begun"
        return f"Trainer({str(self.run)!r}, {self.backend}: {state})"


def _sections(recipe: Any, settings: Mapping[str, Any]) -> Sections:
    """The recipe as plain sections, with the settings in them."""
    if isinstance(recipe, (str, Path)):
        sections = recipes.read(recipes.find(str(recipe)))
    elif isinstance(recipe, Recipe):
        sections = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    elif isinstance(recipe, Mapping):
        sections = {}
        for name, value in recipe.items():
            plain = dataclasses.asdict(value) if dataclasses.is_dataclass(type(value)) else value
            sections[name] = dict(plain) if isinstance(plain, Mapping) else plain
    else:
        raise UserError(
            f"recipe is a {type(recipe).__name__}: expected a recipe's name, a .toml file, a dict of sections or a "
            "Recipe; [model] in it says which model is trained"
        )
    if not isinstance(settings, Mapping) or not all(isinstance(path, str) for path in settings):
        raise UserError(f"settings = {settings!r}: expected a dict of section.key, such as {{'train.steps': 200}}")
    for path, value in settings.items():
        section, dot, key = path.partition(".")
        if not dot or section not in SECTIONS:
            named = [each for each in _KEYS if each.endswith(f".{path}")] if path not in SECTIONS else []
            near = nearest(section, SECTIONS) if dot else or_list(named)
            raise UserError(f"settings: {path!r}{near}: expected section.key, such as train.steps")
        sections.setdefault(section, {})[key] = value
    return sections


def _name_of(given: Any) -> str:
    """What to call a function or an object in environment.json."""
    found = given if hasattr(given, "__qualname__") else type(given)
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


_FLAG = re.compile(
    r"(?P<command>mlxgpt [^;:,]+)|--set (?P<key>[\w.]+)=(?P<value>[^\s;,:]+)|(?<![\w-])--(?P<flag>[a-z][a-z-]+)\b"
)


def _spelled(found: re.Match[str]) -> str:
    """``--set key=value`` and ``--flag`` as a program has them; a whole command stays."""
    if found["command"]:
        return found["command"]
    if found["flag"]:
        return found["flag"].replace("-", "_")
    value = {"true": "True", "false": "False"}.get(found["value"], found["value"])
    plain = value in ("True", "False") or value.isdecimal()
    return f"settings={{{found['key']!r}: {value if plain else repr(value)}}}"


@contextlib.contextmanager
def _in_python() -> Iterator[None]:
    """Flags that an error names as a program spells them."""
    try:
        yield
    except (UserError, RunError) as error:
        error.args = (_FLAG.sub(_spelled, str(error)),)
        raise
