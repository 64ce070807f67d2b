"""What servers are compared on: a llama of random weights with a chat template, in a folder that every peer loads."""

import json
import sysconfig
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 512, "block_size": 1024}
"""Of the soak: many short answers, some of which fill the context."""
SIZES: dict[str, dict[str, Any]] = {
    "10M": {"n_layer": 10, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "block_size": 2048},
    "29M": {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 8192, "block_size": 2048},
}
TEMPLATE = """{% if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SENTENCE = "the device that measures air is a barometer what does it show when a storm comes and how would one read it"
WORDS = f"{SENTENCE} in a house by the sea or on a hill in summer".split(" ")


def write_folder(folder: Path, sizes: dict[str, Any], scale: float = 1.0) -> None:
    """The model, its weights times ``scale``; a BPE trained on the standard library's sources; ChatML with tools."""
    import numpy as np
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params
    from mlxgpt.common.tokenizers.load import load_tokenizer

    config = recipes.build({"model": {"family": "llama", "tied": True, **sizes}}).model
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([path.read_text(errors="ignore") for path in files], trainer)
    source = folder.parent / f"{folder.name}-tokenizer"
    source.mkdir(parents=True)
    backend.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": False}))
    weights = {name: value * np.float32(scale) for name, value in params.init_params(config, 0).items()}
    write_model(folder, config, weights, tokenizer=load_tokenizer(source))


def write_adapter(folder: Path, base: Path, seed: int) -> None:
    """A LoRA adapter of random arrays, large enough to change what the base says."""
    import numpy as np

    from mlxgpt.common.config import AdapterConfig, Recipe, TuneConfig
    from mlxgpt.common.folders import adapter_folder
    from mlxgpt.common.folders.model_folder import read_config
    from mlxgpt.common.model import adapters

    recipe = Recipe(model=read_config(base), tune=TuneConfig(), adapter=AdapterConfig(rank=4))
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(0, 0.3, param.shape).astype(np.float32) for name, param in adapters.trainable(recipe).items()
    }
    folder.mkdir()
    adapter_folder.write_adapter(folder, recipe, base, arrays)


def question(number: int, words: int = 40) -> str:
    """A text of so many words; another one for each number, from its first word on."""
    return (
        " ".join(WORDS[(number * 7 + i * (number % 5 + 1) + number // 5) % len(WORDS)] for i in range(words))
        + f" {number}?"
    )
