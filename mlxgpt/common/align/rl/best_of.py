"""The best of N completions of each prompt, as rows that finetune --task lm trains on: rejection sampling."""

import contextlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common import rng
from mlxgpt.common.align.rl import settings, writing
from mlxgpt.common.align.rl.prompts import Prompt
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import atomic_write
from mlxgpt.common.folders import base_and_adapters

METHOD = "best-of-n"
_TRAINING = ("steps", "lr", "replay", "check", "resume", "stop_after")  # flags of training


def command(args: Namespace) -> int:
    """Writes the best completions into --out.

    Raises:
        UserError: a flag of training, no new .jsonl to write, or what settings, prompts or rewards refuse.
    """
    for name in _TRAINING:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: does nothing with --method {METHOD}, which trains nothing")
    out = Path(args.out or "")
    if out.suffix.lower() != ".jsonl":
        raise UserError(f"--out {args.out or ''}: expected a new .jsonl for --method {METHOD}")
    if out.exists():
        raise UserError(f"--out {out}: exists already: expected a new file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder: {out.parent}")
    given = Namespace(**{**vars(args), "method": None})
    chosen = settings.gather(given)
    recipe = settings.recipe(chosen.sections, chosen.where)
    assert recipe.rl and recipe.tune
    config, backend = recipe.rl, backends.load(args.backend)
    with contextlib.closing(writing.open_rewards(backend, config, args.device, args.run_code)) as rewards:
        adapters = base_and_adapters.parse_adapters([recipe.tune.adapter] if recipe.tune.adapter else []) or None
        writer = writing.Writer(
            backend, recipe.tune.model, adapters, args.device, args.force, recipe.tune, config, print
        )
        drawn = writer.write(config.completions, rng.key32(recipe.train.seed, "best of n"), lambda text: None)
        asked = [row for row in writer.prompts.rows for _ in range(config.completions)]
        total = rewards.total(rewards.check(asked, [each.text for each in drawn]))
    open_ended = np.array([not each.ended for each in drawn])
    scored = np.where(open_ended & config.mask_truncated, -np.inf, total).reshape(-1, config.completions)
    best = scored.argmax(axis=1)
    rows = [
        _row(prompt, drawn[number * config.completions + at].text, float(scored[number, at]))
        for number, (prompt, at) in enumerate(zip(writer.prompts.rows, best.tolist(), strict=True))
        if np.isfinite(scored[number, at])
    ]
    if not rows:
        raise UserError(f"no completion ended within rl.max_tokens = {config.max_tokens}: nothing is written")
    with atomic_write(out) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    left = len(scored) - len(rows)
    cut = f"; {left} prompts without a completion that ended are left out" if left else ""
    mean = float(np.mean([row["reward"] for row in rows]))
    print(f"reward {total.mean():.4f} of all {total.size:,} completions, {mean:.4f} of the best{cut}")
    print(f"{out}: {len(rows):,} rows; mlxgpt finetune --model {recipe.tune.model} --data {out}")
    return 0


def _row(prompt: Prompt, text: str, reward: float) -> dict[str, Any]:
    if prompt.messages is None:
        return {"prompt": prompt.text, "completion": text, "reward": reward}
    return {"messages": [*map(dict, prompt.messages), {"role": "assistant", "content": text}], "reward": reward}
