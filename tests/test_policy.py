"""The policy's objectives in both frameworks against a float64 reference, and faults that the comparison must find."""

import dataclasses
import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import policy_reference
import pytest
import torch
from models import tiny

from mlxgpt.common import backend
from mlxgpt.common.align.rl import rewards
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build

BACKENDS = ("mlx", "torch")
B, T, PROMPT = 6, 12, 3
TEMPERATURE = 0.7
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo-kl": {"kl": 0.3},
    "dr_grpo-kl-k3": {"method": "dr_grpo", "kl": 0.3, "kl_ratio": False},
    "dapo": {"method": "dapo"},
    "rloo": {"method": "rloo"},
    "grpo-first": {"first": True},
}


def recipe(**rl: Any) -> Recipe:
    """A recipe for a tiny model; one step moves nothing."""
    settings = {"temperature": TEMPERATURE, "max_tokens": T, **rl}
    made = build({"rl": settings, "optim": {"clip": 0.0}, "train": {"compile": "off", "batch_size": B}})
    return dataclasses.replace(made, model=tiny(family="llama"))


def batch(config: Any, first: bool, seed: int = 0) -> tuple[Batch, np.ndarray]:
    """Rows of unequal length with what an objective reads, and the mask of what was drawn."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 80, (B, T + 1)).astype(np.int32)
    lengths = random.integers(1, T - PROMPT + 1, B)
    places = np.arange(T)[None]
    mask = ((places >= PROMPT - 1) & (places < PROMPT - 1 + lengths[:, None])).astype(np.float32)
    beside = {"advantages": random.standard_normal(B).astype(np.float32)}
    near = (-4.4 + 0.3 * random.standard_normal((2, B, T))).astype(np.float32)
    if not first:
        beside["old"] = near[0]
    if config.kl:
        beside["reference"] = near[1]
    counts = mask.sum(axis=1, keepdims=True)
    weights = {"sequence": mask / counts, "token": mask * B / mask.sum(), "constant": mask / T}[config.averaged]
    weights = mask if config.method == "rloo" else weights
    made = Batch(rows[:, :-1], rows[:, 1:], weights.astype(np.float32), beside=beside, each=1.0)
    return made, mask


def measured(name: str, made: Recipe, given: Batch) -> tuple[float, float, dict[str, float]]:
    """The loss, the norm of its gradient and the figures of a step."""
    engine = backend.load(name).engine.Engine(made, params.init_params(made.model, 3), device="cpu")
    stats = engine.train_step(1, given.split(4), 0.0)
    return stats.loss_sum / stats.weight, stats.grad_norm, stats.sums


def expected(made: Recipe, given: Batch, mask: np.ndarray) -> tuple[float, float, torch.Tensor]:
    """The reference's loss, the norm of its gradient through the model, and log-probabilities."""
    engine = backend.load("torch").engine.Engine(made, params.init_params(made.model, 3), device="cpu")
    logits = engine.model(torch.from_numpy(given.tokens)).double() / TEMPERATURE
    logps = logits.log_softmax(dim=-1).gather(2, torch.from_numpy(given.targets).long()[..., None])[..., 0]
    config = made.rl
    assert config
    beside = {key: torch.from_numpy(array).double() for key, array in given.beside.items()}
    high = 0.28 if config.method == "dapo" else 0.2
    found = policy_reference.loss(
        config.method, logps, beside.get("old"), beside.get("reference"), beside["advantages"],
        torch.from_numpy(mask).double(), 0.2, high, config.kl, config.kl_ratio, max_tokens=T,
    )  # fmt: skip
    gradients = torch.autograd.grad(found, list(engine.weights.values()))
    norm = float(torch.sqrt(sum((each.double() ** 2).sum() for each in gradients)))  # type: ignore[arg-type]
    return float(found.detach()), norm, logps.detach()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_reference(case: str) -> None:
    rl = dict(CASES[case])
    first = rl.pop("first", False)
    made = recipe(**rl)
    given, mask = batch(made.rl, first)
    loss, norm, logps = expected(made, given, mask)
    for name in BACKENDS:
        found, gradient, sums = measured(name, made, given)
        print(f"{case} {name}: loss {abs(found - loss):.1e}, norm {abs(gradient / norm - 1):.1e}")
        assert abs(found - loss) <= 1e-6 and abs(gradient / norm - 1) <= 2e-5
        assert sums["logp"] == pytest.approx(float((logps * torch.from_numpy(mask)).sum()), abs=1e-4)
        assert first or sums["low"] + sums["high"] > 0


def faults() -> dict[str, Any]:
    """Name -> (case, module path, attribute, what is put there)."""

    def other_sign(real: Any) -> Any:
        def tokens(model: Any, batch: Any, config: Any, *more: Any) -> Any:
            return real(model, batch, dataclasses.replace(config, kl=-config.kl) if config.kl else config, *more)

        return tokens

    def no_temperature(real: Any) -> Any:
        return lambda *args, temperature=1.0, **more: real(*args, **more)

    def shifted(real: Any) -> Any:
        def lm(model: Any, batch: Any, *args: Any, **more: Any) -> Any:
            return real(model, batch._replace(targets=batch.tokens), *args, **more)

        return lm

    return {
        "temperature left out": ("grpo", "losses", "lm", no_temperature),
        "logits off by one": ("grpo", "losses", "lm", shifted),
        "KL with the other sign": ("grpo-kl", "policy", "tokens", other_sign),
    }


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("fault", faults())
def test_a_fault_in_the_objective_is_found(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, place, attribute, mutate = faults()[fault]
    made = recipe(**CASES[case])
    if "sign" in fault:  # negative weights are refused in a recipe
        monkeypatch.setattr(type(made.rl), "__post_init__", lambda self: None)
    given, mask = batch(made.rl, False)
    loss, norm, _ = expected(made, given, mask)
    module = importlib.import_module(f"{backend.PACKAGES[name]}.{place}")
    monkeypatch.setattr(module, attribute, mutate(getattr(module, attribute)))
    found, gradient, _ = measured(name, made, given)
    assert abs(found - loss) > 1e-4 and abs(gradient / norm - 1) > 1e-3


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("prompt counted", lambda weights, mask: weights + (np.arange(T) < PROMPT - 1)),
        ("end untrained", lambda weights, mask: weights * (np.cumsum(mask, 1) < mask.sum(1, keepdims=True))),
        ("mean for sum", lambda weights, mask: mask * B / mask.sum()),
    ],
)
def test_wrong_weights_are_found(what: str, change: Any) -> None:
    made = recipe()
    given, mask = batch(made.rl, False)
    loss, norm, _ = expected(made, given, mask)
    wrong = dataclasses.replace(given, weights=change(given.weights, mask).astype(np.float32))
    found, gradient, _ = measured("torch", made, wrong)
    assert abs(found - loss) > 1e-4 and abs(gradient / norm - 1) > 1e-3


REWARDS = np.array([[0.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0 + 1e-7], [0.0, 3.0, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("method", "scale"),
    [("grpo", "group"), ("grpo", "batch"), ("grpo", "none"), ("rloo", "none"), ("rloo", "batch")],
)
def test_advantages_are_those_of_the_reference(method: str, scale: str) -> None:
    found = rewards.advantages(REWARDS, method, scale)
    assert found == pytest.approx(policy_reference.advantages(REWARDS, method, scale), abs=1e-12)
    equal = found.reshape(4, 4)[1]
    assert (equal == 0).all() or (method, scale) == ("rloo", "batch")
    # a spread of nothing stays one, and does not explode
    assert np.abs(found.reshape(4, 4)[2]).max() < 1e-2 or scale == "batch"


@pytest.mark.parametrize("fault", ["ddof 0", "no epsilon"])
def test_another_deviation_is_found(fault: str) -> None:
    wrong = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        wrong = wrong / (REWARDS.std(axis=1, ddof=int(fault != "ddof 0"), keepdims=True) + 1e-4 * (fault == "ddof 0"))
    assert not np.allclose(wrong.ravel(), policy_reference.advantages(REWARDS, "grpo", "group"), atol=1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "ppo"}, "rl.method = 'ppo'"),
        ({"completions": 1}, "rl.completions = 1: expected 2 at least"),
        ({"method": "rloo", "mean": "token"}, "rl.mean = 'token'"),
        ({"method": "rloo", "scale": "group"}, "rl.scale = 'group'"),
        ({"rewards": ["exact"], "weights": [1.0, 2.0]}, "rl.weights"),
        ({"check": True}, "rl.check = True"),
        ({"temperature": 0.0}, "rl.temperature = 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        build({"rl": values})
    assert said in str(error.value)


def test_the_reference_is_trls_own() -> None:
    """Where trl is installed: its _compute_loss on random log-probabilities, values and gradients."""
    pytest.importorskip("trl")
    theirs = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss
    torch.manual_seed(0)
    logps = (-3 * torch.rand(B, T, dtype=torch.float64)).requires_grad_()
    old, reference = (logps.detach() + 0.4 * torch.randn(B, T, dtype=torch.float64) for _ in range(2))
    better, mask = torch.randn(B, dtype=torch.float64), (torch.arange(T) < torch.arange(2, B + 2)[:, None]).double()
    accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction="": x, gather=lambda x: x)
    for method in ("grpo", "dr_grpo", "dapo"):
        high = 0.28 if method == "dapo" else 0.2
        fake = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *args, **more: (logps, torch.zeros(B, T), None),
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.1, use_vllm=False,
            importance_sampling_level="token", loss_type=method, epsilon_low=0.2, epsilon_high=high,
            args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
            model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=T,
            accelerator=accelerator, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        )  # fmt: skip
        ids = torch.zeros(B, T, dtype=torch.long)
        given = {
            "prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask,
            "advantages": better, "old_per_token_logps": old, "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        found = theirs(fake, None, given)
        ours = policy_reference.loss(method, logps, old, reference, better, mask, 0.2, high, 0.1, max_tokens=T)
        assert float((found - ours).detach()) == pytest.approx(0, abs=1e-12)
        apart = torch.autograd.grad(found, logps)[0] - torch.autograd.grad(ours, logps)[0]
        assert float(apart.abs().max()) < 1e-12
