"""The verb ``plan``: memory, time and cost before anything runs.

The bytes come from the framework's own steps, run by a subprocess on a smaller copy (common/plan/similar.py), so what
is predicted is what is run, whatever the model; for chips that are not here, from a closed form.
"""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes, units
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model_config import SCORE
from mlxgpt.common.plan import budget as plan_budget
from mlxgpt.common.plan import calibrate as plan_calibrate
from mlxgpt.common.plan import chips, machine, measured
from mlxgpt.common.plan import compute as plan_compute
from mlxgpt.common.plan import memory as plan_memory
from mlxgpt.common.plan import show as plan_show
from mlxgpt.common.plan.chips import Chip
from mlxgpt.common.recipes import apply_sets, build, to_toml
from mlxgpt.common.tokenizers.load import KINDS, load_tokenizer
from mlxgpt.common.tokenizers.protocol import NAMES

_CHAR_VOCABULARY = 128  # assumed for a character tokenizer, since the text is not read


def plan_command(args: Namespace) -> int:
    """Prints what a run needs or, with a budget, which run to make.

    Args:
        args: recipe, model, data, method, set, steps, chip, price, calibrate, budget, hours, memory, out, plot, json,
            backend, device.

    Raises:
        UserError: wrong usage or input.
    """
    if args.plot:
        plan_show.check_plot(Path(args.plot))
    budgeted = args.budget is not None or args.hours is not None or args.memory is not None
    if args.out and not budgeted:
        raise UserError("--out: writes the recipe of --budget, --hours or --memory: expected one of them")
    if args.data and not args.model:
        cure = "the recipe of a run: mlxgpt plan RUN/recipe.toml, or mlxgpt train --data, which plans before it begins"
        raise UserError(f"--data {args.data}: with --model, for fine-tuning; for pre-training expected {cure}")
    if args.model and args.recipe:
        raise UserError(f"{args.recipe} and --model {args.model}: expected one of the two")
    chip = chips.chip_named(args.chip) if args.chip is not None else None
    recipe, notes = _recipe(args)
    process, here = measured.look(args.backend, args.device)
    with process:
        result = _plan_budget(args, recipe, here, chip) if budgeted else _plan_recipe(args, recipe, process, here, chip)
    result = {"backend": here.backend, **result, "notes": [*notes, *result["notes"]]}
    if args.plot:
        plan_show.plot(result, Path(args.plot))
    if args.json:
        print(json.dumps(result))
    else:
        plan_show.show((plan_show.budget_rows if budgeted else plan_show.rows)(result))
        for flag, path in (("recipe", args.out), ("plot", args.plot)):
            if path:
                print(f"{flag}: {path}")
    return 0


def _recipe(args: Namespace) -> tuple[Recipe, list[str]]:
    """The recipe to plan, with its vocabulary size, and notes about assumptions."""
    sections: dict[str, dict[str, Any]] = {}
    where = "--set"
    if not args.model:
        path = recipes.find(args.recipe or "pydocs")
        sections, where = recipes.read(path), str(path)
    elif args.data or args.method:
        sections = {"tune": {"source": args.data or ""}, "adapter": {"method": args.method or "lora"}}
    sections = apply_sets(sections, args.set)
    if args.steps:
        sections["train"] = {**sections.get("train", {}), "steps": args.steps}
    recipe = build(sections, where)
    if args.model:
        place = resolve.resolve_model(args.model)
        model = model_folder.read_config(place)
        if recipe.tune and recipe.tune.task == "reward":
            model = dataclasses.replace(model, labels=SCORE)
        return dataclasses.replace(recipe, model=model), []
    if recipe.model.vocab_size:
        return recipe, []
    tokenizer, notes = recipe.data.tokenizer, []
    if tokenizer == "char":
        size, notes = _CHAR_VOCABULARY, [f"a vocabulary of {_CHAR_VOCABULARY} characters is assumed"]
    elif tokenizer in KINDS:
        size = recipe.data.vocab_size
    elif tokenizer in NAMES or Path(tokenizer).exists():
        size = load_tokenizer(tokenizer).n_vocab
    else:
        expected = ", ".join((*KINDS, *NAMES))
        raise UserError(f"data.tokenizer = {tokenizer!r}: expected one of {expected}, or the path of one")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=size)), notes


def _plan_recipe(
    args: Namespace, recipe: Recipe, process: measured.Process, here: measured.Here, chip: Chip | None
) -> dict[str, Any]:
    """Memory, time and cost of the recipe."""
    notes: list[str] = []
    timing = None
    if args.calibrate:
        if chip:
            raise UserError(f"--calibrate: times this machine, not {chip.name}: expected no --chip")
        if recipe.tune:
            raise UserError("--calibrate: only for pre-training recipes; fine-tuning takes --chip")
        source, _ = plan_calibrate.open_data(recipe)
        model = dataclasses.replace(recipe.model, vocab_size=max(recipe.model.vocab_size, source.vocab_size))
        recipe = dataclasses.replace(recipe, model=model)
        timing = plan_calibrate.time_steps(recipe, source, backends.load(here.backend), args.device)
    where = machine.room(here.capacity)
    if chip and chip != chips.chip_of(here.device):
        size = int(chip.memory * 1e9)
        where = {"total": size, "free": size, "recommended": 0, "limit": size}
        notes.append(f"memory is from a closed form, to about 25%: {chip.name} is not here to measure on")
        need = _need(recipe, measured.computed(here.backend, True), where["limit"])
    else:
        patience = None if args.measure else process.patience()
        measure = measured.Measured(
            here.backend, args.device, here.cpu, where["limit"], patience, args.measure, process
        )
        need = _need(recipe, measure, where["limit"])
        notes += measure.notes
    chip = chip or chips.chip_of(here.device)
    seconds, origin = None, None
    if timing:
        seconds, origin = timing.run(recipe), f"{timing.rate:,.0f} tokens/s measured here"
    elif chip:
        seconds = plan_compute.seconds(recipe, plan_memory.length(recipe), chip)
        origin = f"{chip.name} at an assumed {chip.utilization:.0%} of its peak"
    tokens, length = plan_compute.tokens(recipe, plan_memory.length(recipe)), plan_memory.length(recipe)
    each = plan_compute.flops(recipe, length, recipe.train.batch_size)
    rows, _ = plan_memory.micro_batch(recipe)
    itemsize = 2 if recipe.train.compute_dtype == "bfloat16" else 4
    trains = sum(int(plan_memory.elements(param.shape)) for param in adapters.trainable(recipe).values())
    return {
        "title": f"{recipe.model.family}, {recipe.model.n_layer} layers of {recipe.model.n_embd}",
        "device": chip.name if args.chip and chip else here.device,
        "parameters": params.count(recipe.model),
        "trainable": trains,
        "flops_per_token": dataclasses.asdict(each),
        "micro_batch_size": rows,
        "unit": "pairs" if recipe.together == 2 else "rows",
        "length": length,
        "kv_cache": kv_cache.size(recipe.model, 1, length, itemsize),
        "machine": where,
        **need,
        "steps": recipe.train.steps,
        "tokens": tokens,
        "compute": each.exact * tokens,
        "seconds": seconds,
        "seconds_from": origin,
        "price": args.price,
        "cost": None if args.price is None or seconds is None else args.price * seconds / 3600,
        "notes": notes,
    }  # fmt: skip


def _need(recipe: Recipe, measure: plan_memory.Measure, limit: int) -> dict[str, Any]:
    """The part of the plan that is about memory."""
    memory = plan_memory.plan(recipe, measure)
    return {
        "memory": {"peak": memory.peak, "components": memory.components, "checkpoint_copy": memory.copy,
                   "whole": memory.whole},
        "activations_per_layer": {key: plan_memory.per_layer(recipe, measure, again)
                                  for key, again in (("kept", False), ("recomputed", True))},
        "fits": memory.whole <= limit,
        "largest_micro_batch": plan_memory.largest_rows(recipe, measure, limit),
        "longest_row": plan_memory.longest(recipe, measure, limit),
    }  # fmt: skip


def _plan_budget(args: Namespace, recipe: Recipe, here: measured.Here, chip: Chip | None) -> dict[str, Any]:
    """The best model for a budget."""
    if recipe.tune or args.model:
        raise UserError("--budget, --hours and --memory: choose a model to pre-train: expected no --model")
    hours, currency, price = args.hours, "", args.price
    if args.budget is not None:
        if hours is not None:
            raise UserError("--budget and --hours: expected one of the two")
        amount, currency = plan_budget.money(args.budget)
        if not price:
            raise UserError(f"--budget {args.budget}: expected --price as well, what an hour costs")
        hours = amount / price
    timed = hours is not None
    if timed and chip is None:
        chip = plan_budget.default_chip(here.device)
    limit = machine.room(here.capacity)["limit"]
    if chip and args.chip:
        limit = int(chip.memory * 1e9)
    if args.memory:
        limit = units.read_size(args.memory, "--memory")
    dtype = recipe.train.compute_dtype
    compute = plan_budget.compute_of(hours, chip, dtype) if timed and chip else None
    measure = measured.computed(here.backend, bool(chip) or not here.cpu)
    choice = plan_budget.choose(recipe, compute, limit, measure)
    made = choice.recipe
    if args.out:
        plan_budget.write(Path(args.out), made)
    seconds = plan_compute.seconds(made, made.model.block_size, chip) if chip else None
    memory = plan_memory.plan(made, measure)
    model = made.model
    return {
        "title": "the compute-optimal run" if timed else "the largest run that the memory takes",
        "device": chip.name if chip else here.device,
        "compute": choice.compute,
        "parameters": choice.size,
        "tokens": choice.tokens,
        "model": f"{model.family}, {model.n_layer} layers of {model.n_embd}, {model.n_head} heads, "
                 f"context {model.block_size}, vocabulary {model.vocab_size}",
        "range": [{"parameters": round(size), "tokens": round(tokens)} for size, tokens in choice.range],
        "loss": list(choice.loss),
        "steps": made.train.steps,
        "seconds": seconds,
        "seconds_from": chip and f"{chip.name} at an assumed {chip.utilization:.0%} of its peak",
        "price": price,
        "cost": None if price is None or seconds is None else price * seconds / 3600,
        "currency": currency,
        "memory": {"peak": memory.peak, "components": memory.components, "checkpoint_copy": memory.copy,
                   "whole": memory.whole},
        "limit": limit,
        "recipe": to_toml(made),
        "notes": [*([choice.note] if choice.note else []),
                  "memory is from a closed form, to about 25%: mlxgpt plan RECIPE measures the one that was chosen"],
    }  # fmt: skip
