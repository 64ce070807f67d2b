"""mlx-lm's LoRA config: what it means here, what is said, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxgpt.common.errors import UserError
from mlxgpt.common.recipes import build
from mlxgpt.common.sft import mlx_lm_yaml

# mlx_lm/examples/lora_config.yaml of mlx-lm 0.32, shortened
EXAMPLE = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
data: "data/"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


def read(tmp_path: Path, **changed: Any) -> mlx_lm_yaml.Config:
    """The example with keys replaced."""
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE) | {"learning_rate": 1e-5} | changed))
    return mlx_lm_yaml.read_config(file)


def test_the_example_of_mlx_lm_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(EXAMPLE)
    found = mlx_lm_yaml.read_config(tmp_path / "lora.yaml")
    recipe = build(found.sections)
    assert recipe.tune and recipe.adapter
    assert (recipe.tune.model, recipe.tune.source, found.out) == ("mlx_model", "data/", "adapters")
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.optim.schedule, recipe.optim.warmup) == (
        1e-5,
        1e-7,
        "cosine",
        100,
    )
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (8, 160.0)
    assert recipe.adapter.targets == ("self_attn.q_proj", "self_attn.v_proj")
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.eval_every, recipe.train.eval_batches) == (
        1000, 4, 200, 25,
    )  # fmt: skip
    assert recipe.tune.train_on_prompt and not recipe.tune.packing and not recipe.tune.test
    assert (found.layers, found.chosen) == (16, True)
    said = " ".join(found.notes)
    for part in ("corrects its bias", "batch_size: 4 rows", "warmup_init", "the decay ends at step 1000"):
        assert part in said, part


def test_what_is_left_out_has_mlx_lms_default(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("model: m\ndata: d\n")
    found = mlx_lm_yaml.read_config(tmp_path / "lora.yaml")
    recipe = build(found.sections)
    assert recipe.adapter and recipe.adapter.alpha == 20.0 * 8 and recipe.optim.lr == 1e-5
    assert recipe.optim.schedule == "constant" and recipe.optim.clip == 0 and recipe.optim.weight_decay == 0
    assert recipe.train.steps == 1000 and (found.layers, found.chosen) == (16, False)
    assert found.sections["tune"]["block_size"] == 0  # at most 2048, and no more than the model's context
    assert read(tmp_path, max_seq_length=512).sections["tune"]["block_size"] == 512


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", "1.0e-5"])
def test_small_rates_are_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "lora.yaml").write_text(f"learning_rate: {text}\n")
    assert mlx_lm_yaml.read_config(tmp_path / "lora.yaml").sections["optim"]["lr"] == 1e-5


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    found = read(tmp_path, grad_accumulation_steps=4, lr_schedule=None, mask_prompt=True)
    train = found.sections["train"]
    assert (train["steps"], train["batch_size"], train["micro_batch_size"], train["eval_every"]) == (250, 16, 4, 50)
    assert not found.sections["tune"]["train_on_prompt"]
    assert "every turn of the assistant" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rat": 1}, "unknown key learning_rat (did you mean 'learning_rate'?)"),
        ({"hf_dataset": {"path": "x"}}, "hf_dataset: not supported"),
        ({"prompt_feature": "question"}, "prompt_feature: expected --set tune.prompt_key=question"),
        ({"optimizer": "adafactor"}, "optimizer = 'adafactor'"),
        ({"optimizer": "sgd"}, "sgd is not supported"),
        ({"report_to": "swanlab"}, "report_to = 'swanlab'"),
        ({"trust_remote_code": True}, "trust_remote_code = True"),
        ({"fine_tune_type": "qlora"}, "fine_tune_type = 'qlora'"),
        ({"lora_parameters": {"rank": 8, "scale": 20.0, "alpha": 16}}, "alpha = 16 and scale = 20 disagree"),
        ({"lora_parameters": {"rank": 8}}, "lora_parameters.scale is missing"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "lora_parameters.rank = 0"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "kyes": []}}, "lora_parameters.kyes (did you mean 'keys'?)"),
        ({"lr_schedule": {"name": "step_decay", "arguments": [1, 2, 3]}}, "lr_schedule.name = 'step_decay'"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 300]}}, "the decay ends with the run"),
        ({"iters": "many"}, "iters = 'many'"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"grad_checkpoint": "yes please"}, "grad_checkpoint = 'yes please'"),
        ({"optimizer_config": {"adamw": {"betas": [0.9]}}}, "optimizer_config.adamw.betas"),
        ({"optimizer_config": {"adamw": {"momentum": 1}}}, "unknown key optimizer_config.adamw.momentum"),
        ({"train": False}, "train = False"),
    ],
)
def test_what_is_not_here_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, **changed)
    assert message in str(caught.value) and str(tmp_path / "lora.yaml") in str(caught.value)


def test_alpha_that_agrees_with_scale_is_taken(tmp_path: Path) -> None:
    found = read(tmp_path, lora_parameters={"rank": 8, "scale": 2.0, "alpha": 16})
    assert found.sections["adapter"]["alpha"] == 16


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("model: [", "not a YAML file"),
        ("- a\n", "found list"),
        ("!!python/name:os.system", "not a YAML file"),
    ):
        (tmp_path / "lora.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            mlx_lm_yaml.read_config(tmp_path / "lora.yaml")
