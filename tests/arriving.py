"""Models of others: made by transformers, read here, written again; what each step changes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ladder
import mlx.core as mx
import numpy as np
import rounding
import torch
import transformers
from compare import worst

import mlxgpt.load
import torch_ref.load
import torch_ref.model
from mlxgpt.common import rng
from mlxgpt.common.folders import model_folder

TOKENS = rng.integers(5, "tokens", 0, count=2 * 64, high=80).astype(np.int32).reshape(2, 64)


@dataclass(frozen=True)
class Arrived:
    """A folder of transformers' read here: distances of the logits from float64, and what float32 costs them."""

    mlx: float
    torch: float
    transformers: float
    cost: float

    @property
    def gate(self) -> float:
        return rounding.gate(self.cost)

    @property
    def agrees(self) -> bool:
        """NaN and Inf agree with nothing."""
        return bool(np.isfinite(self.cost)) and max(self.mlx, self.torch, self.transformers) <= self.gate


def saved(values: dict[str, Any], place: Path, own_config: bool) -> transformers.PreTrainedModel:
    """transformers' model of this config, with random weights; ``own_config``: config.json is these very keys."""
    torch.manual_seed(0)
    keys = {key: value for key, value in values.items() if key not in ("architectures", "torch_dtype", "auto_map")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(place)
    if own_config:
        (place / "config.json").write_text(json.dumps(values))
    return model


def arrive(case: str, place: Path, theirs: transformers.PreTrainedModel) -> Arrived:
    """Reads the folder in both frameworks."""
    expected = theirs(torch.from_numpy(TOKENS)).logits.detach().numpy()
    config = model_folder.read_config(place)
    model, _ = torch_ref.load.load(place, device="cpu")
    exact = torch_ref.model.Model(config, torch.float64).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.from_numpy(TOKENS)
    found, judge = ladder.host(model(tokens)), ladder.host(exact(tokens))
    ours = np.array(mlxgpt.load.load(place, device="cpu")[0](mx.array(TOKENS)))
    return Arrived(
        worst(f"{case}: MLX", ours, judge),
        worst(f"{case}: torch", found, judge),
        worst(f"{case}: transformers", expected, judge),
        worst(f"{case}: cost", ladder.host(rounding.rounded(exact, tokens)), judge),
    )


def loaded(place: Path) -> transformers.PreTrainedModel:
    """As a user of transformers reads a folder, in float32."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    return load(place, dtype=torch.float32).eval()


def goes_back(place: Path, out: Path, theirs: transformers.PreTrainedModel) -> int:
    """Writes what was read, which transformers must load with every tensor equal and none missing or left: how many."""
    config = model_folder.read_config(place)
    model_folder.write_model(out, config, model_folder.read_params(place, config))
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    back, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    state = back.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(back.eval()(torch.from_numpy(TOKENS)).logits, theirs(torch.from_numpy(TOKENS)).logits)
    return len(state)
