"""Which tokenizer class of transformers reads a folder: tokenizer_class, config.json's model_type, and the exceptions.

The tables are transformers' own as of 5.23 (models/auto/tokenization_auto.py): which class each model type has, and the
model types whose published tokenizer_class is not believed.
"""

from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError

PLAIN = "TokenizersBackend"  # transformers' name for "tokenizer.json as it is"; PreTrainedTokenizerFast in older files

# class: its model types. These are read here.
_READ = """\
TokenizersBackend: EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5
    ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2
    gpt_bigcode gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat hyperclovax
    hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next
    mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 mistral
    mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4
    nystromformer olmo2 olmo3 olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe
    pix2struct pixtral pocket_tts smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl
LlamaTokenizer: idefics idefics2
CodeLlamaTokenizer: code_llama
GemmaTokenizer: diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2
    t5gemma zaya
GPT2Tokenizer: blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2
    opt phi starcoder2
GPTNeoXTokenizer: falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm
Qwen2Tokenizer: audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr
    moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3
    qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice
Qwen3_5Tokenizer: qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp
CohereTokenizer: aya_vision cohere cohere2
T5Tokenizer: mt5 musicgen musicgen_melody switch_transformers t5
"""
# These have text handling of their own that is not: refused by name.
_REFUSED = """\
AlbertTokenizer: albert yoso
BarthezTokenizer: barthez
BartphoTokenizer: bartpho
BertGenerationTokenizer: bert-generation
BertJapaneseTokenizer: bert-japanese
BertTokenizer: align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git grounding-dino
    layoutlm lxmert megatron-bert mm-grounding-dino mobilebert nezha nomic_bert qdqbert realm retribert squeezebert
    tvp vilt visual_bert
BertweetTokenizer: bertweet
BigBirdTokenizer: big_bird
BioGptTokenizer: biogpt
BlenderbotSmallTokenizer: blenderbot-small
BlenderbotTokenizer: blenderbot
ByT5Tokenizer: byt5
CLIPTokenizer: aimv2 clip clipseg groupvit omdet-turbo oneformer owlv2 owlvit sam3 sam3_video xclip
CTRLTokenizer: ctrl
CamembertTokenizer: camembert
CanineTokenizer: canine
ClvpTokenizer: clvp
CpmAntTokenizer: cpmant
CpmTokenizer: cpm
DPRQuestionEncoderTokenizer: dpr
DebertaTokenizer: deberta
DebertaV2Tokenizer: deberta-v2
DiaTokenizer: dia
EsmTokenizer: esm
EsmcTokenizer: esmc esmfold2
FNetTokenizer: fnet
FSMTTokenizer: fsmt
FlaubertTokenizer: flaubert
FunnelTokenizer: funnel
GPTNeoXJapaneseTokenizer: gpt_neox_japanese
GPTSw3Tokenizer: gpt-sw3
HerbertTokenizer: herbert
LasrTokenizer: lasr_ctc lasr_encoder
LayoutLMv2Tokenizer: layoutlmv2
LayoutLMv3Tokenizer: layoutlmv3
LayoutXLMTokenizer: layoutxlm
LukeTokenizer: luke
M2M100Tokenizer: m2m_100
MBart50Tokenizer: mbart50
MBartTokenizer: mbart
MLukeTokenizer: mluke
MPNetTokenizer: mpnet
MarianTokenizer: marian
MarkupLMTokenizer: markuplm
MgpstrTokenizer: mgp-str
MyT5Tokenizer: myt5
NllbTokenizer: nllb nllb-moe
NougatTokenizer: nougat pp_formulanet
OpenAIGPTTokenizer: openai-gpt
PLBartTokenizer: plbart
ParakeetTokenizer: granite_speech5_ctc nemotron3_5_asr nemotron_asr_streaming parakeet_ctc parakeet_rnnt
    parakeet_tdt
PegasusTokenizer: pegasus
PerceiverTokenizer: perceiver
PhobertTokenizer: phobert
ProphetNetTokenizer: prophetnet
RagTokenizer: rag
ReformerTokenizer: reformer
RemBertTokenizer: rembert
RoCBertTokenizer: roc_bert
RoFormerTokenizer: roformer
RobertaTokenizer: bart bridgetower clap data2vec-text florence2 ibert led lilt longformer mega mra mvp roberta
    roberta-prelayernorm
SeamlessM4TTokenizer: seamless_m4t seamless_m4t_v2
Siglip2Tokenizer: siglip2
SiglipTokenizer: siglip
Speech2TextTokenizer: speech_to_text
SpeechT5Tokenizer: speecht5
SplinterTokenizer: splinter
TapasTokenizer: tapas
Tipsv2Tokenizer: tipsv2
UdopTokenizer: udop
VideoPrismTokenizer: videoprism
VitsTokenizer: vits
Wav2Vec2CTCTokenizer: data2vec-audio hubert unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer
Wav2Vec2PhonemeCTCTokenizer: wav2vec2_phoneme
WhisperTokenizer: whisper
XGLMTokenizer: xglm
XLMRobertaTokenizer: gte jina_embeddings_v3 metaclip_2 trocr xlm-roberta xmod
XLMTokenizer: xlm
XLNetTokenizer: xlnet
"""
_REFUSED_TOO = """\
BartTokenizer BertTokenizerLegacy ConvBertTokenizer DPRContextEncoderTokenizer DPRReaderTokenizer
    DistilBertTokenizer ElectraTokenizer FastSpeech2ConformerTokenizer LEDTokenizer LayoutLMTokenizer
    LongformerTokenizer LxmertTokenizer MobileBertTokenizer MvpTokenizer PreTrainedTokenizerBase
    SentencePieceBackend SqueezeBertTokenizer
"""
# Model types whose folders name a wrong class: the type's own is taken.
_DISBELIEVED = """\
arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax
hyperclovax_vision_v2 hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv
minimax_m2 modernbert modernbert-decoder molmo molmo2 nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v
phimoe qwen2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava
"""
# Model types with a class but without a config that AutoConfig knows: named classes are compared with theirs, no more.
_UNCONFIGURED = """\
barthez bartpho bert-japanese bertweet byt5 code_llama cpm herbert mbart50 mega mluke myt5 nezha nllb phobert qdqbert
realm retribert wav2vec2_phoneme
"""
_ALIASES = {
    "Phi3Tokenizer": "LlamaTokenizer",
    "PreTrainedTokenizer": PLAIN,
    "PreTrainedTokenizerFast": PLAIN,
    "PythonBackend": PLAIN,
    "BloomTokenizer": PLAIN,
}


def _table(text: str) -> dict[str, str]:
    """Model type -> class."""
    made, name = {}, ""
    for word in text.split():
        if word.endswith(":"):
            name = word[:-1]
        else:
            made[word] = name
    return made


_CLASS_OF = _table(_READ) | _table(_REFUSED)
READ = {*_table(_READ).values(), "CodeGenTokenizer"}
REFUSED = {*_table(_REFUSED).values(), *_REFUSED_TOO.split()}


def _known(name: str) -> str | None:
    """The class that transformers finds under ``name``; None for none."""
    for each in (name, name.removesuffix("Fast")):
        each = _ALIASES.get(each, each)
        if each in READ or each in REFUSED:
            return each
    return None


def class_of(settings: dict[str, Any], model: dict[str, Any], byte_level: bool, where: Path) -> str:
    """The class with which AutoTokenizer reads a folder, one of ``READ``.

    Args:
        settings: tokenizer_config.json.
        model: config.json.
        byte_level: whether there is a tokenizer.json that speaks of ByteLevel.
        where: the folder, for messages.

    Raises:
        UserError: a class whose text handling is not known here, or code of the folder's own.
    """
    name = _chosen(settings, model, byte_level, where)
    if name in REFUSED:
        raise UserError(
            f"{where}: a {name}, whose handling of text is not known here: expected one of {', '.join(sorted(READ))}; "
            'tokenizer_class = "PreTrainedTokenizerFast" in tokenizer_config.json takes a tokenizer.json as it is'
        )
    return name


def _chosen(settings: dict[str, Any], model: dict[str, Any], byte_level: bool, where: Path) -> str:
    kind, own = _word(model.get("model_type")), _word(settings.get("tokenizer_class"))
    disbelieved = bool({kind, _word(model.get("model_name"))} & {*_DISBELIEVED.split()})
    registered = _CLASS_OF.get(kind or "")
    code = settings.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    named = own or _word(model.get("tokenizer_class"))
    if not code and named:
        if named.removesuffix("Fast") == "LlamaTokenizer" and not disbelieved and byte_level:
            return PLAIN
        if registered and registered != named.removesuffix("Fast"):
            if registered == PLAIN:
                return PLAIN
            return (registered if disbelieved else _known(named)) or PLAIN
    if code and not registered and not disbelieved and (own is None or _known(own) is None):
        raise UserError(
            f"{where / 'tokenizer_config.json'}: auto_map: a tokenizer with code of its own, which is not run: "
            "expected a tokenizer.json (transformers' save_pretrained writes one) and no auto_map"
        )
    if own:
        return _known(own) or PLAIN
    if named:
        found = _known(named)
        if found is None:
            raise UserError(f"{where / 'config.json'}: tokenizer_class {named!r}: transformers has no such class")
        return found
    return (registered if kind not in _UNCONFIGURED.split() else None) or PLAIN


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
