"""What servers are compared on: a llama of random weights with a chat template, in a folder that every peer loads."""

import json
import sysconfig
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "10M": {"n_layer": 10, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "block_size": 2048},
    "29M": {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 8192, "block_size": 2048},
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCE = "the device that measures air is a barometer what does it show when a storm comes and how would one read it"
WORDS = f"{SENTENCE} in a house by the sea or on a hill in summer".split(" ")


def write_folder(folder: Path, size: str) -> None:
    """The model, a byte-level BPE trained on the standard library's sources, and ChatML as its template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params
    from mlxgpt.common.tokenizers.load import load_tokenizer

    config = recipes.build({"model": {"family": "llama", "tied": True, **SIZES[size]}}).model
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
    write_model(folder, config, params.init_params(config, 0), tokenizer=load_tokenizer(source))


def question(number: int, words: int = 40) -> str:
    """A text of so many words; another one for each number, from its first word on."""
    return (
        " ".join(WORDS[(number * 7 + i * (number % 5 + 1) + number // 5) % len(WORDS)] for i in range(words))
        + f" {number}?"
    )
