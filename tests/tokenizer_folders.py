"""Tokenizer folders of every shape, from small vocabularies trained once, and the texts that they are compared on."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "It was the best of times, it was the worst of times; it was the age of wisdom.",
    "def mean(xs):\n    return sum(xs) / len(xs)  # 3.14, 12 o'clock",
    "We'll say they don't: 'tis the season of light   and three spaces",
    "na\u00efve caf\u00e9 \u4f60\u597d\uff0c\u4e16\u754c \u0416\u0443\u043a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "user system assistant im_start im_end the user asked and the assistant said",
] * 12
MARKERS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<pad>", "<extra>")


def texts() -> list[str]:
    """200 texts: languages, markers inside, spaces, control characters, long runs."""
    hard = [
        "", " ", "  ", "   x", "x   ", "  two before", "two after  ", "\n", "\n\n\n", "\t", "\ta\tb", "\r\n x",
        "a\r\nb", "a\u2581b", "\u2581", "\u2581\u2581x", "\u2581 x", " \u2581x", "\x00", "a\x00b", "\x01\x02\x7f",
        "\x85", "a\u2028b\u2029c", "\u00a0a\u2003b\u3000c", "\ufeffbom", "zero\u200bwidth\u200d",
        "e\u0301 \u0301\u0327", "\u1e9b\u0323", "\ufb01ne \u00bd \u2167 \uff21\uff22", "\u212b \u00c5",
        "\u1100\u1161\u11a8 \uac01", "\U0001f525\U0001f600\u200d\u2764\ufe0f", "\U0001d54f\U00010348", "\ufffd",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0915\u094d\u0937", "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3000\u4f60",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd", "it's I'LL 'S 'RE we'd",
        "12345 1,000.50 \u0664\u0665", "<0x0A> <0xE4>", " .", "a . b , c ! d ? e 's n't 've", "a" * 300, " " * 70,
        "\n" * 50, "ab" * 200, "the " * 100, "=" * 90, "\u4f60" * 60, "\U0001f525" * 40,
    ]  # fmt: skip
    around = [
        f(marker)
        for marker in MARKERS
        for f in (
            lambda m: m,
            lambda m: f"a{m}b",
            lambda m: f"a {m} b",
            lambda m: f"{m}{m}",
            lambda m: f"  {m}  it was\n{m}",
            lambda m: f"it was{m}\n  the{m} best ",
        )
    ]
    turns = [
        "<|im_start|>user\nit was<|im_end|>\n<|im_start|>assistant\n", "<s>[INST] the best [/INST] of times </s>",
        "<|im_start|>system\n  two<|im_end|>\n", "<start_of_turn>user\nhi<end_of_turn>\n", "<|user|>the<|end|>",
        "< s >", "<s", "s>", "<S>",
    ]  # fmt: skip
    rng = random.Random(0)
    alphabet = "".join(hard) + " " * 40 + "the best of times" * 6
    pieces = [*CORPUS[:5], *MARKERS, " ", "  ", "\n", "\t"]
    mixed = []
    while len(hard) + len(around) + len(turns) + len(mixed) < 200:
        if len(mixed) % 2:
            mixed.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60))))
        else:
            mixed.append("".join(rng.choice(pieces) for _ in range(rng.randrange(1, 6))))
    return [*hard, *around, *turns, *mixed]


def _model(**how: Any) -> bytes:
    writer = io.BytesIO()
    options = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True} | how
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return writer.getvalue()


class Sources:
    """What the folders are made of, trained once."""

    def __init__(self) -> None:
        as_it_is = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        self.llama = _model(**as_it_is)
        self.user_defined = _model(**as_it_is, user_defined_symbols=["<|user|>", "[INST]"], control_symbols=["<extra>"])
        self.gemma = _model(
            **as_it_is, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
            eos_piece="<eos>", bos_piece="<bos>",
            user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\u2581\u2581"],
        )  # fmt: skip
        self.nfkc = _model()
        self.unigram = _model(model_type="unigram", vocab_size=400)
        self.t5 = _model(
            model_type="unigram", vocab_size=120, byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
        )
        self.bytes = _byte_level()
        self.words = _words()
        content = json.loads(self.bytes.to_str())
        self.vocabulary, self.merges = content["model"]["vocab"], content["model"]["merges"]
        self.metaspace = _metaspace(self.llama)


def _byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _words() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def _metaspace(model: bytes) -> tokenizers.Tokenizer:
    """The tokenizer.json that earlier transformers made of a Llama tokenizer.model."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    scored = sorted((-processor.get_score(i), text) for text, i in vocabulary.items() if len(text) > 1 and i > 258)
    merges = [
        (text[:cut], text[cut:]) for _, text in scored for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]  # fmt: skip
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer_config.json has it."""
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    return {"content": content} | plain | flags


CHATML = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
PLAIN, LLAMA, GPT2 = (
    {"tokenizer_class": f"{name}"} for name in ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer")
)
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
Files = dict[str, Any]


def _listed(first: int, *contents: Any) -> dict[str, Any]:
    tokens = [token(content) if isinstance(content, str) else content for content in contents]
    return {"added_tokens_decoder": {str(first + i): one for i, one in enumerate(tokens)}}


def shapes(made: Sources) -> dict[str, Files]:
    """Folders by name: file name -> bytes, text or what is written as JSON."""
    llama, size = {"tokenizer.model": made.llama}, 420
    gemma = {"tokenizer.model": made.gemma}
    json_of = {"tokenizer.json": made.bytes.to_str()}
    pair = {"vocab.json": made.vocabulary, "merges.txt": _merges(made)}
    spaces = {"tokenizer.json": made.metaspace.to_str()}

    def config(*parts: dict[str, Any], **more: Any) -> Files:
        settings: dict[str, Any] = {}
        for part in parts:
            settings |= part
        return {"tokenizer_config.json": settings | more}

    def model_type(name: str, **more: Any) -> Files:
        return {"config.json": {"model_type": name} | more}

    wild = (
        token("<|im_start|>", lstrip=True),
        token("<|im_end|>", rstrip=True),
        token("user", single_word=True, special=False),
        token("the best", normalized=True, special=False),
        token("\u2581of", special=False),
    )
    named = {"bos_token": "<s>", "eos_token": token("</s>"), "additional_special_tokens": ["<extra>", "<|im_start|>"]}
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    return {
        # tokenizer.model
        "model": llama,
        "model, config.json llama": llama | model_type("llama"),
        "model, nfkc": {"tokenizer.model": made.nfkc},
        "model, unigram": {"tokenizer.model": made.unigram},
        "model, user-defined pieces": {"tokenizer.model": made.user_defined},
        "model, plain class, placeholder renamed": llama
        | config(PLAIN, _listed(size - 1, "<extra>"), eos_token="<extra>"),
        "model, plain class, BOS": llama | config(PLAIN, add_bos_token=True, add_eos_token=True),
        "model, unknown class": llama | config(tokenizer_class="NobodysTokenizer"),
        "model, Llama": llama | config(LLAMA),
        "model, Llama, legacy": llama | config(LLAMA, legacy=True),
        "model, Llama, no prefix": llama | config(LLAMA, add_prefix_space=False),
        "model, Llama, BOS and EOS": llama | config(LLAMA, add_bos_token=True, add_eos_token=True),
        "model, Llama, nfkc": {"tokenizer.model": made.nfkc} | config(LLAMA, legacy=True, add_bos_token=True),
        "model, Llama, unigram": {"tokenizer.model": made.unigram} | config(LLAMA),
        "model, Llama, ChatML": llama | config(LLAMA, CHATML, _listed(size, "<|im_start|>", "<|im_end|>", "<pad>")),
        "model, Llama, ids that nobody has": llama
        | config(LLAMA, _listed(900, "<|im_start|>", "<|im_end|>"), legacy=True),
        "model, Llama, flags": llama | config(LLAMA, _listed(size, *wild)),
        "model, Llama, legacy and flags": llama | config(LLAMA, _listed(size, *wild), legacy=True),
        "model, Llama, added_tokens.json": llama
        | config(LLAMA)
        | {"added_tokens.json": {"<extra>": size + 1, "<|im_end|>": size}},
        "model, Llama, map": llama | config(LLAMA, eos_token="<eos>") | {"special_tokens_map.json": named},
        "model, Llama, map and added": llama
        | config(LLAMA)
        | {"special_tokens_map.json": named, "added_tokens.json": {"<extra>": size}},
        "model, Llama, map beside the decoder": llama
        | config(LLAMA, _listed(size, "<|im_end|>"))
        | {"special_tokens_map.json": named},
        "model, Llama, additional": llama | config(LLAMA, additional_special_tokens=["<|im_start|>", "<extra>"]),
        "model, Llama, extra list": llama
        | config(LLAMA, extra_special_tokens=["<|im_start|>"], additional_special_tokens=["<a>"]),
        "model, Llama, extra dict": llama
        | config(LLAMA, extra_special_tokens={"image_token": "<extra>", "odd": "<bos>"}),
        "model, Llama, a token of its own name": llama
        | config(LLAMA, image_token="<extra>", audio_token={"__type": "AddedToken"} | token("<eos>")),
        "model, Llama, no names": llama | config(LLAMA, bos_token=None, eos_token=None, add_bos_token=True),
        "model, Llama, user-defined pieces": {"tokenizer.model": made.user_defined} | config(LLAMA),
        "model, Llama, user-defined and extra": {"tokenizer.model": made.user_defined}
        | config(LLAMA, extra_special_tokens=["<eos>"]),
        "model, Llama, split_special_tokens": llama
        | config(LLAMA, _listed(size, "<|im_end|>"), split_special_tokens=True),
        "model, Llama, other lengths": llama
        | config(LLAMA, model_max_length=4, clean_up_tokenization_spaces=True, padding_side="left"),
        "model, LlamaTokenizerFast": llama
        | config(tokenizer_class="LlamaTokenizerFast", legacy=True, add_bos_token=True),
        "model, Phi3Tokenizer": llama | config(tokenizer_class="Phi3Tokenizer"),
        "model, Llama, config.json mistral": llama | config(LLAMA, add_bos_token=True) | model_type("mistral"),
        "model, Llama, config.json phi3": llama | config(LLAMA) | model_type("phi3"),
        "model, class in config.json": llama | model_type("llama", tokenizer_class="LlamaTokenizer"),
        "model, CodeLlama": llama | config(tokenizer_class="CodeLlamaTokenizer"),
        "model, Gemma": gemma | config(tokenizer_class="GemmaTokenizer", add_bos_token=True),
        "model, config.json gemma2": gemma | model_type("gemma2"),
        "model, Gemma, turns": gemma
        | config(_listed(4, "<mask>"), tokenizer_class="GemmaTokenizer", additional_special_tokens=["<start_of_turn>"]),
        "model, T5": {"tokenizer.model": made.t5} | config(tokenizer_class="T5Tokenizer", extra_ids=3),
        "model, T5, listed": {"tokenizer.model": made.unigram}
        | config(tokenizer_class="T5Tokenizer", eos_token="</s>"),
        "model, config.json gpt2": llama | model_type("gpt2"),
        # tokenizer.json
        "json": json_of,
        "json, plain class": json_of | config(PLAIN, eos_token="<|endoftext|>"),
        "json, names only in the settings": json_of | config(PLAIN, CHATML, bos_token="<s>"),
        "json, added_tokens.json": json_of | {"added_tokens.json": {"<|im_end|>": 401, "<|im_start|>": 400}},
        "json, map": json_of | {"special_tokens_map.json": named},
        "json, map as v4 wrote it": json_of
        | {"special_tokens_map.json": {"eos_token": token("<|im_end|>"), "pad_token": "<pad>"}},
        "json, decoder": json_of | config(PLAIN, CHATML, _listed(400, *wild)),
        "json, BOS in the settings": json_of | config(PLAIN, bos_token="<s>", add_bos_token=True),
        "json, template of Llama 3": {"tokenizer.json": _with_bos(made.bytes)}
        | config(PLAIN, bos_token="<s>", eos_token="</s>"),
        "json, Llama of bytes": {"tokenizer.json": _with_bos(made.bytes)} | config(LLAMA, legacy=True),
        "json, GPT2": json_of | config(GPT2),
        "json, GPT2, prefix": json_of | config(GPT2, add_prefix_space=True, pad_token="<pad>"),
        "json, GPT2, BOS in the file": {"tokenizer.json": _with_bos(made.bytes)} | config(GPT2, add_bos_token=False),
        "json, config.json gpt2": json_of | model_type("gpt2"),
        "json, config.json gpt2, plain class": json_of | config(PLAIN) | model_type("gpt2"),
        "json, CodeGen": json_of | config(tokenizer_class="CodeGenTokenizer"),
        "json, GPTNeoX": json_of | config(tokenizer_class="GPTNeoXTokenizer", add_bos_token=True),
        "json, GPTNeoX, an end that NFC would change": json_of
        | config(tokenizer_class="GPTNeoXTokenizer", eos_token="e\u0301")
        | {"added_tokens.json": {"e\u0301": 400, "the\u0301": 401}},
        "json, GPTNeoX, BOS in the file": {"tokenizer.json": _with_bos(made.bytes)}
        | config(tokenizer_class="GPTNeoXTokenizerFast"),
        "json, config.json olmo2, GPTNeoX": json_of | config(tokenizer_class="GPTNeoXTokenizer") | model_type("olmo2"),
        "json, Qwen2": json_of
        | config(_listed(400, "<|im_start|>", "<|im_end|>"), tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>"),
        "json, config.json qwen2, plain class": json_of | config(PLAIN) | model_type("qwen2"),
        "json, config.json qwen3": json_of | model_type("qwen3"),
        "json, Qwen3.5": json_of | config(tokenizer_class="Qwen3_5Tokenizer", add_prefix_space=True),
        "json, Cohere": json_of | config(tokenizer_class="CohereTokenizerFast"),
        "json, unknown class": json_of | config(tokenizer_class="NobodysTokenizer"),
        "json, limits": {"tokenizer.json": _limited(made.bytes)} | config(PLAIN),
        "json of a model": spaces,
        "json of a model, Llama": spaces | config(LLAMA, add_bos_token=False),
        "json of a model, Llama, legacy": spaces | config(LLAMA, legacy=True, add_eos_token=True),
        "json of a model, Llama, no prefix": spaces
        | config(LLAMA, add_prefix_space=False, use_default_system_prompt=False),
        "json of a model, config.json mistral": spaces | config(LLAMA) | model_type("mistral"),
        "json of a model, Llama, config.json llama": spaces | config(LLAMA, CHATML) | model_type("llama"),
        "json and model, added": spaces | llama | config(LLAMA, _listed(size, "<|im_end|>"), eos_token="<|im_end|>"),
        "json of words": {"tokenizer.json": made.words.to_str()}
        | config(PLAIN, clean_up_tokenization_spaces=True, unk_token="[UNK]"),
        "json, T5": {"tokenizer.json": _t5_json(made)} | config(tokenizer_class="T5TokenizerFast", extra_ids=2),
        "json, CodeLlama": spaces | config(tokenizer_class="CodeLlamaTokenizer", add_bos_token=False),
        "json, Gemma": spaces | config(tokenizer_class="GemmaTokenizer") | model_type("gemma3_text"),
        # vocab.json and merges.txt
        "pair, GPT2": pair | config(GPT2),
        "pair, config.json gpt2": pair | model_type("gpt2"),
        "pair, OPT": pair
        | config(
            GPT2, add_bos_token=True, bos_token=_typed("</s>"), eos_token=_typed("</s>"), pad_token=_typed("<pad>")
        )
        | {"special_tokens_map.json": {"bos_token": token("</s>"), "unk_token": token("</s>")}},
        "pair, CodeGen, BOS": pair | config(tokenizer_class="CodeGenTokenizer", add_bos_token=True),
        "pair, Qwen2": pair | config(_listed(400, "<|im_start|>", "<|im_end|>"), tokenizer_class="Qwen2Tokenizer"),
        "pair, GPTNeoX": pair | config(tokenizer_class="GPTNeoXTokenizer") | {"added_tokens.json": {"<extra>": 401}},
        # templates
        "template in the settings": llama | config(LLAMA, chat_template=TEMPLATE),
        "templates as a list": json_of | config(PLAIN, chat_template=templates),
        "template as a file": json_of
        | config(PLAIN, chat_template="not this")
        | {"chat_template.jinja": TEMPLATE + "\r\n"},
        "templates as files": llama
        | config(LLAMA)
        | {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool_use.jinja": "{{ tools }}"},
        "template of a processor": json_of | config(PLAIN) | {"chat_template.json": {"chat_template": TEMPLATE}},
    }


def _typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken"} | token(content, normalized=True)


def _merges(made: Sources) -> str:
    return "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in made.merges) + "\n"


def _with_bos(backend: tokenizers.Tokenizer) -> str:
    """With <s> before a text, as Llama 3's tokenizer.json has it."""
    content = json.loads(backend.to_str())
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.add_special_tokens(["<s>", "</s>"])
    copy.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 400)]),
        ]
    )
    return copy.to_str()


def _limited(backend: tokenizers.Tokenizer) -> str:
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=8)
    return copy.to_str()


def _t5_json(made: Sources) -> str:
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=made.t5)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)], unk_id=2))
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"])
    return backend.to_str()


def refused(made: Sources) -> dict[str, tuple[Files, str]]:
    """Folders that are refused, by name: the files and what the message says."""
    llama, json_of = {"tokenizer.model": made.llama}, {"tokenizer.json": made.bytes.to_str()}
    pair = {"vocab.json": made.vocabulary, "merges.txt": _merges(made)}
    named = "tokenizer_config.json"
    return {
        "another class": (json_of | {named: {"tokenizer_class": "BertTokenizer"}}, "a BertTokenizer, whose handling"),
        "another class by model_type": (json_of | {"config.json": {"model_type": "bert"}}, "a BertTokenizer"),
        "code of its own": (
            json_of | {named: {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}},
            "auto_map: a tokenizer with code of its own",
        ),
        "a class that nobody has, in config.json": (
            llama | {"config.json": {"model_type": "llama", "tokenizer_class": "OwnTokenizer"}},
            "no such class",
        ),
        "tekken": ({"tekken.json": {}, named: {}}, "tekken.json"),
        "tekken beside a model": (llama | {"tekken.json": {}}, "tekken.json"),
        "tiktoken": ({"tokenizer.model": b"IQ== 0\nIg== 1\n", named: {}}, "a vocabulary of tiktoken"),
        "tiktoken.model": ({"tiktoken.model": b"IQ== 0\nIg== 1\n", named: {}}, "tiktoken.model"),
        "a file for each version": (
            json_of | {named: {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"]}},
            "fast_tokenizer_files",
        ),
        "tokens added to a unigram model": (
            {"tokenizer.model": made.unigram, "added_tokens.json": {"<extra>": 420}},
            "tokens added to a unigram",
        ),
        "pair of a class that reads none": (
            pair | {named: {"tokenizer_class": "LlamaTokenizer"}},
            "vocab.json of a LlamaTokenizer",
        ),
        "T5 of a BPE": (
            json_of | {named: {"tokenizer_class": "T5Tokenizer"}},
            "not a tokenizer that T5Tokenizer reads",
        ),
        "no model": ({"tokenizer.model": b"nonsense"}, "not a SentencePiece model"),
    }


def write(files: Files, folder: Path) -> Path:
    """The folder with these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder
