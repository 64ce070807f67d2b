"""The verb ``adopt``: somebody's own GPT as a folder that everything here runs, proved by a sample of its logits."""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.adopt import apply, evidence, map_file, module, roles, sets, show, source, tokens
from convert.adopt.evidence import Sample
from convert.adopt.landing import OWN, Landing, land, own
from convert.adopt.maps import moments, opening, ready
from convert.adopt.maps.complete import complete
from convert.adopt.proof.candidate import config_of, distance, live
from convert.adopt.proof.search import Found, search
from convert.adopt.rules import Map, Proposal, chosen
from convert.conversion import Report, convert_opened, line, put_tokenizer
from convert.formats import output
from convert.formats.opened import Opened, Tensor
from convert.formats.registry import format_of
from convert.verify import processes
from mlxgpt.common.backend import PACKAGES, resolve
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference.probe import KEPT


class Unlike(RunError):
    """transformers computes something else, or does not load the folder."""


@dataclass
class Adoption:
    """Everything that was found out, and what was written."""

    state: source.State
    proposal: Proposal
    given: list[str]
    by_map: bool = False
    found: Found | None = None
    landing: Landing | None = None
    report: Report | None = None
    verified: dict[str, float] = field(default_factory=dict)  # who ran the folder -> how far off its logits were
    notes: list[str] = field(default_factory=list)

    @property
    def map(self) -> Map:
        """The map that is taken."""
        if self.found:
            return self.found.map
        likeliest = chosen(self.proposal.map, tuple(choice.options[0] for choice in self.proposal.choices))
        return dataclasses.replace(likeliest, model=live(likeliest.model))

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        shapes = {name: tensor.shape for name, tensor in self.state.tensors.items()}
        found, landing = self.found, self.landing
        return {
            "source": str(self.state.path),
            "mapping": show.mapping(self.map, shapes),
            "left": dict(self.map.left),
            "sizes": show.sizes(config_of(self.map.model)),
            "model": dict(self.map.model),
            "choices": show.choices(self.proposal, found, self.given),
            "proved": bool(found and found.fits),
            "error": found.error if found and math.isfinite(found.error) else None,
            "gate": found.gate if found else None,
            "departs": found.departs if found else "",
            "candidates": found.candidates if found else 0,
            "runs": found.runs if found else 0,
            "seconds": found.seconds if found else 0.0,
            "landing": {"family": landing.config.family, "published": landing.published, "why": landing.why}
            if landing
            else None,
            "verified": self.verified,
            "path": str(self.report.path) if self.report else None,
            "notes": [*self.notes, *(self.report.notes if self.report else ())],
        }


def adopt_command(args: argparse.Namespace) -> int:
    """Prints what was recognized, proves it where there is evidence, and writes the folder.

    Args:
        args: file, out, like, module, kwargs, map, choices, unproved, tokenizer, tolerance, backend, json, force.

    Raises:
        UserError: the file, the sample or a setting is wrong; or there is no evidence and no --unproved.
        RunError: no candidate fits, or the written folder does not give the sample's logits.
    """
    out = sys.stderr if args.json else sys.stdout
    _check_out(args)
    made = recognize(args)
    tensors = _kept(made.state)
    sample = _sample(args, made, out)
    if sample is None:
        made.landing = land(config_of(made.map.model))
        _show(made, out)
        _refuse_unproved(args, made)
    else:
        package = importlib.import_module(f"{PACKAGES[resolve(args.backend)]}.trial")
        made.found = search(
            made.proposal, apply.Pieces(tensors, f"{made.state.path}: ").gather, sample, package.Trials().run,
            made.given, args.tolerance,
        )  # fmt: skip
        made.notes += [*sample.notes, *made.found.notes]
        if made.found.fits:
            made.landing = land(made.found.config)
        _show(made, out)
        if not made.found.fits:
            if args.json:
                print(json.dumps(made.to_json()))
            raise RunError(f"{made.state.path}: {_misfit(made.found)}; nothing was written")
    if args.out:
        write(args, made, tensors, sample, out)
    if args.json:
        print(json.dumps(made.to_json()))
    elif made.report:
        for note in made.report.notes:
            print(f"note: {note}")
        print(line(made.report))
        print("\n".join(_next(made.report.path, made.state.path)))
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """Refuses a place that cannot be written, before any work."""
    if not args.out:
        return
    place = Path(args.out).expanduser()
    if not place.absolute().parent.is_dir():
        raise UserError(f"{place.parent}: no such folder")
    output.check_free(place, args.force)


def recognize(args: argparse.Namespace) -> Adoption:
    """The state dict and what it is, by a map or by its names and shapes; with the choices that were given."""
    state = source.read(args.file)
    if args.map:
        shapes = {name: tensor.shape for name, tensor in state.tensors.items()}
        proposal = Proposal(map_file.read(Path(args.map).expanduser(), shapes), ())
    else:
        try:
            proposal = _proposal(state, bool(args.like or args.module))
        except UserError as error:
            said = str(error)
            raise UserError(said if said.startswith(str(state.path)) else f"{state.path}: {said}") from None
    proposal, given = sets.settle(proposal, args.choices)
    return Adoption(state, proposal, given, bool(args.map), notes=[*state.notes, *proposal.notes])


def _proposal(state: source.State, evidence: bool) -> Proposal:
    """What a ready map says, or names and shapes; where there is evidence, all that it can prove is open."""
    known = ready.propose(state)
    if known and not evidence:
        return known
    try:
        found = roles.propose(state)
    except UserError:
        if known is None:
            raise
        return known
    return ready.ahead(found, known) if known else found


def _kept(state: source.State) -> Mapping[str, Tensor]:
    """The tensors, each read from its file once."""
    return {
        name: dataclasses.replace(tensor, read=functools.cache(tensor.read)) for name, tensor in state.tensors.items()
    }


def _sample(args: argparse.Namespace, made: Adoption, out: Any) -> Sample | None:
    """The evidence, if any was given; --module's is made, which is said before."""
    if args.like and args.module:
        raise UserError("--like and --module: expected one of them")
    if args.kwargs and not args.module:
        raise UserError("--kwargs: expected --module FILE.py:Class with it")
    if not args.like and not args.module:
        return None
    sizes = config_of(made.map.model)
    if args.module:
        sample = module.of_state(
            module.parse(args.module, args.kwargs),
            made.state,
            made.map,
            say=lambda text: print(text, file=out, flush=True),
        )
    else:
        sample = evidence.read(args.like)
    tables = [option.model for choice in made.proposal.choices for option in choice.options]
    if not any({"vocab_size", "block_size"} & set(model) for model in tables):  # else the sample tells which is which
        learned = any("wpe.weight" in rule.to for rule in made.map.rules)
        sample.check(sizes.vocab_size, sizes.n_layer, sizes.n_embd, sizes.block_size if learned else 0)
    return sample


def _show(made: Adoption, out: Any) -> None:
    """The table, the choices, the verdict and what the model lands in."""
    shapes = {name: tensor.shape for name, tensor in made.state.tensors.items()}
    show.table(show.mapping(made.map, shapes), made.map.left, out)
    sizes = show.sizes(made.found.config if made.found else config_of(made.map.model))
    print("\nsizes:", ", ".join(f"{name} {value}" for name, value in sizes.items()), file=out)
    rows = show.choices(made.proposal, made.found, made.given)
    if rows:
        print("what the weights cannot say:", file=out)
        print("\n".join(show.lines(rows)), file=out)
    for note in made.notes:
        print(f"note: {note}", file=out)
    if made.found:
        print(show.verdict(made.found), file=out)
    if made.landing:
        print(show.landed(made.landing), file=out)


def _misfit(found: Found) -> str:
    """Why nothing is written."""
    said = show.verdict(found)
    if found.departs:
        said = f"{said}; {found.departs}"
    if found.error < 0.03:
        said += f"; if the sample was made in half precision or TF32, --tolerance {2 * found.error:.0e} takes it"
    return said


def _refuse_unproved(args: argparse.Namespace, made: Adoption) -> None:
    """Without evidence, what is written was asked for."""
    if not args.out or args.unproved or made.by_map:
        return
    left = [choice for choice in made.proposal.choices if choice.name not in made.given and len(choice.options) > 1]
    asked = " ".join(f"--set {sets.keys(choice)[0]}=..." for choice in left[:6]) + " ..." * (len(left) > 6)
    choice = f"say what you know ({asked}) and --unproved" if left else "--unproved"
    raise UserError(
        f"{made.state.path}: no evidence: expected --like SAMPLE.npz or --module FILE.py:Class, which prove the"
        f" choices; or {choice} to write it without proof"
    )


def write(
    args: argparse.Namespace, made: Adoption, tensors: Mapping[str, Tensor], sample: Sample | None, out: Any
) -> None:
    """Writes the folder with its map, and keeps it only if it gives the sample's logits."""
    assert made.landing
    try:
        _write(args, made, tensors, sample, out)
    except Unlike as error:
        made.notes.append(f"{error}: written as family {OWN} instead")
        print(f"note: {made.notes[-1]}", file=out)
        made.landing = own(config_of(made.map.model), f"{made.landing.config.family}: {error}")
        _write(args, made, tensors, sample, out)


def _write(
    args: argparse.Namespace, made: Adoption, tensors: Mapping[str, Tensor], sample: Sample | None, out: Any
) -> None:
    assert made.landing
    config = made.landing.config
    whole = complete(made.map, made.state)
    opened = Opened(
        made.state.path,
        "adopt",
        config,
        opening.tensors(made.map, dataclasses.replace(made.state, tensors=tensors), config),
        made.state.files,
        moments=moments.fused(whole.moments, config) if whole.moments else None,
        notes=list(whole.notes),
        origin={"adopted": _origin(args, made)},
    )

    tokenizer, said = tokens.find(made.state.extras, made.state.path, args.tokenizer, config.vocab_size)
    opened.notes += said
    if tokenizer:
        put_tokenizer(opened, tokenizer)

    def check(place: Path) -> None:
        map_file.write(place / map_file.NAME, whole.map, whole.kept)
        if sample is not None:
            made.verified = verify_written(place, made, sample, out)

    made.report = convert_opened(opened, args.file, args.out, "hf", force=args.force, verify=check)
    made.report.verified = bool(made.verified)


def _origin(args: argparse.Namespace, made: Adoption) -> dict[str, Any]:
    """What the provenance says of the choices."""
    rows = show.choices(made.proposal, made.found, made.given)
    return {
        "proved": bool(made.found and made.found.fits),
        "by": args.like or args.module,
        "choices": {row["name"]: [row["value"], row["verdict"]] for row in rows},
    }


def verify_written(place: Path, made: Adoption, sample: Sample, out: Any) -> dict[str, float]:
    """Runs a written folder in each framework that is here, and in transformers where it has the architecture.

    Raises:
        RunError: logits are not the sample's.
    """
    assert made.found and made.landing
    off: dict[str, float] = {}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(name) is not None:
            logits = importlib.import_module(f"{package}.trial").answer(place, sample.ids)
            off[name] = distance(sample.comparable(logits), sample.logits).worst
    _judge(off, made)
    if made.landing.published and importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        off["transformers"] = _transformers(place, made, sample)
        if not off["transformers"] <= made.found.gate:
            raise Unlike(f"transformers is off by {off['transformers']:.1e} of the largest logit")
    print(f"the folder's logits agree: {', '.join(f'{name} {worst:.1e}' for name, worst in off.items())}", file=out)
    return off


def _judge(off: Mapping[str, float], made: Adoption) -> None:
    """Refuses a folder of which a framework gives other logits."""
    assert made.found and made.landing
    for name, worst in off.items():
        if not worst <= made.found.gate:
            raise RunError(
                f"{made.state.path}: written as {made.landing.config.family}, {name} is off by {worst:.1e} of the"
                f" largest logit (gate {made.found.gate:.1e}); nothing was kept"
            )


def _transformers(place: Path, made: Adoption, sample: Sample) -> float:
    """How far transformers' logits of the last tokens of the first row are off.

    Raises:
        Unlike: it does not load the folder.
    """
    opened, ids = format_of("hf").read(place), sample.ids[0]
    with tempfile.TemporaryDirectory() as made_at:
        work, runs = Path(made_at), processes.Runs()
        plan = processes.write_plan(np.append(ids, ids[:1]).astype(np.int32), work, False, False)
        processes.run_judge("transformers", "a", opened, plan, [], work, runs)
        if runs.failed:
            raise Unlike(f"transformers does not run the folder ({', '.join(runs.failed.values())})")
        logits = runs.arrays["transformers", "a"]["logits.x1"]
    theirs = sample.comparable(logits[None])
    wanted = sample.logits[:1] if sample.last else sample.logits[:1, -KEPT:]
    return distance(theirs, wanted).worst


def _next(folder: Path, theirs: Path) -> list[str]:
    """What can be done now."""
    place = shlex.quote(str(folder))
    prompt = tokens.prompt(folder)
    return [
        "next:",
        *([f"  mlxgpt generate -m {place} -p {shlex.quote(prompt)}"] if prompt else []),
        f"  mlxgpt train --init-from {place} --data books/",
        f"  mlxgpt finetune --model {place} --data rows.jsonl",
        f"  mlxgpt convert {place} back{theirs.suffix or '.pt'} --map {shlex.quote(str(folder / map_file.NAME))}",
    ]
