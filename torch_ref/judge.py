"""transformers as the judge of a folder; see common/inference/judge.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.inference import judge as judging
from mlxgpt.common.inference import probe
from mlxgpt.common.inference.judge import Arrays
from mlxgpt.common.inference.probe import KEPT, Request
from mlxgpt.common.model import families, params
from mlxgpt.common.tokenizers.load import has_tokenizer


def judge(place: Path, config: ModelConfig, request: Request, probes: Sequence[str]) -> Arrays:
    """AutoModelForCausalLM in float32 on the CPU."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(place, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    model.eval()
    ours, table, weights = families.from_foreign(config), params.table(config), {}
    for foreign, value in model.named_parameters():
        name = str(families.strip(config, foreign))
        if name in ours and ours[name][0] in table:
            weights[ours[name][0]] = (value, ours[name][1])
    tokens, targets = (torch.from_numpy(array).long() for array in request.batch)

    def forward(scale: float, before: float) -> Arrays:
        with torch.no_grad():
            for name, factor in probe.growth(config, scale, before).items():
                if name in weights:
                    weights[name][0].mul_(factor)
        model.zero_grad()
        answer = model(tokens, output_hidden_states=True)
        yield "logits", answer.logits[0, -KEPT:].detach().float().numpy()
        spelled = ["embed", *(f"h.{n}" for n in range(config.n_layer - 1)), "ln_f"]  # its last state is after the norm
        for name, state in zip(spelled, answer.hidden_states, strict=True):
            yield f"hidden.{name}", state[0, -KEPT:].detach().float().numpy()
        if request.gradients:
            torch.nn.functional.cross_entropy(answer.logits.flatten(0, 1).float(), targets.flatten()).backward()
            for name, (value, transposed) in weights.items():
                if value.grad is not None:
                    yield f"gradient.{name}", (value.grad.T if transposed else value.grad).numpy()

    @torch.no_grad()
    def step(ids: list[int], cache: Any) -> tuple[np.ndarray, Any]:
        seen, past = cache or ([], None)
        every = [*seen, *ids]
        if config.rope_scaling == "longrope" and len(seen) <= config.rope_original < len(every):
            past, ids = None, every  # as transformers' generate does, which this loop does not go through
        answer = model(torch.tensor([ids]), past_key_values=past, use_cache=True)
        return answer.logits[0, -1].float().numpy(), (every, answer.past_key_values)

    said = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    plain = {name: (value.T if transposed else value).detach() for name, (value, transposed) in weights.items()}
    digests = {name: judging.digest(value.numpy()) for name, value in plain.items()}
    ids = None
    if probes and has_tokenizer(place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in probes]
    yield "report", judging.report(said, digests, ids)
    yield from judging.answers(config, request, forward, step, None)


if __name__ == "__main__":
    sys.exit(judging.main(judge, sys.argv[1:]))
