"""Tokenizers of every kind that llama.cpp runs, small, as the gguf package's writer takes them."""

import functools
import io
import json
from dataclasses import dataclass, field

import gguf as package
import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from convert.formats.gguf import pre
from mlxgpt.common.tokenizers.folder import sp_model

TEXT = (
    "It was the best of times. def mean(xs):\n    return sum(xs) / len(xs)  # 3.14159 2024\n\tna\u00efve caf\u00e9, "
    "\u4f60\u597d\uff0c\u4e16\u754c! \U0001f525\r\n"
    "\u0416\u0443\u043a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 e\u0301 WE'LL CamelCase "
    "they don't   three   spaces \u00bd \u2167.\n"
) * 4
BOS, EOS, TURN, THINK, PAD = "<|bos|>", "<|endoftext|>", "<|im_end|>", "<think>", "<|pad|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Given:
    """A vocabulary for the package's writer."""

    model: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unk, pad
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token and so on, as the writer's methods are called
    charsmap: bytes = b""
    template: str = ""

    def padded(self, n_vocab: int) -> "Given":
        """With unused tokens up to ``n_vocab``, as llama.cpp's converter adds them."""
        extra = range(len(self.tokens), n_vocab)
        scores = None if self.scores is None else self.scores + [-10000.0] * len(extra)
        more = {"tokens": self.tokens + [f"[PAD{i}]" for i in extra], "types": self.types + [5] * len(extra)}
        return Given(**{**vars(self), **more, "scores": scores})

    def write(self, writer: package.GGUFWriter) -> None:
        """Gives it to the package's writer."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for name, i in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(i)
        for name, flag in self.flags.items():
            getattr(writer, f"add_{name}")(flag)
        if self.charsmap:
            writer.add_precompiled_charsmap(self.charsmap)
        if self.template:
            writer.add_chat_template(self.template)


@functools.cache
def byte_level(name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits text as ``tokenizer.ggml.pre`` = ``name`` says, with marks behind its merges."""
    rule = pre.RULES[name]
    _, split = pre.written(name)
    backend = tokenizers.Tokenizer(BPE(ignore_merges=rule.ignore_merges))
    backend.normalizer = normalizers.NFC() if rule.nfc else None
    content = json.loads(backend.to_str()) | {"pre_tokenizer": split}
    backend.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens([BOS, EOS, "<|im_start|>", TURN, PAD])
    backend.add_tokens([THINK])
    return backend


def of_byte_level(name: str, bos: bool) -> Given:
    """Its vocabulary; ``bos``: whether a text begins with BOS."""
    content = json.loads(byte_level(name).to_str())
    added = {one["id"]: one for one in content["added_tokens"]}
    tokens = {i: token for token, i in content["model"]["vocab"].items()}
    tokens |= {i: one["content"] for i, one in added.items()}
    ids = {token: i for i, token in tokens.items()}
    types = [(3 if added[i]["special"] else 4) if i in added else 1 for i in range(len(tokens))]
    return Given(
        "gpt2",
        [tokens[i] for i in range(len(tokens))],
        types,
        name,
        merges=[" ".join(pair) for pair in content["model"]["merges"]],
        ids={"bos": ids[BOS], "eos": ids[EOS], "eot": ids[TURN], "pad": ids[PAD]},
        flags={"add_bos_token": bos},
        template=CHATML,
    )


@functools.cache
def sentencepiece_model(unigram: bool, prefix: bool) -> bytes:
    """A SentencePiece model with the marks of a chat, byte fallback in BPE, NFKC in unigram."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=writer,
        vocab_size=400 if not unigram else 110,
        model_type="unigram" if unigram else "bpe",
        normalization_rule_name="nmt_nfkc" if unigram else "identity",
        remove_extra_whitespaces=unigram,
        add_dummy_prefix=prefix,
        byte_fallback=not unigram,
        control_symbols=["<|im_start|>", TURN],
        user_defined_symbols=[THINK],
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return writer.getvalue()


def of_sentencepiece(unigram: bool = False, prefix: bool = True, bos: bool = True) -> Given:
    """Its vocabulary."""
    model = sp_model.read(sentencepiece_model(unigram, prefix))
    pieces = model.pieces
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    scores = [score for _, score in model.scores()]
    flags = {"add_bos_token": bos, "add_eos_token": False, "add_space_prefix": prefix}
    return Given(
        "t5" if unigram else "llama",
        [piece.text for piece in pieces],
        [piece.kind for piece in pieces],
        scores=scores,
        ids={"bos": ids["<s>"], "eos": ids["</s>"], "unk": ids["<unk>"], "eot": ids[TURN]},
        flags=flags | ({"remove_extra_whitespaces": True} if unigram else {}),
        charsmap=model.charsmap if unigram else b"",
        template=CHATML,
    )
