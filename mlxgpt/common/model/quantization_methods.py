"""What config.json says of quantized weights: the method by its name, and which of them are read here."""

from collections.abc import Mapping
from typing import Any

KEYS = ("quantization", "quantization_config", "compression_config")  # of config.json
# quant_method -> how its authors write it; what is not here is called as config.json calls it
_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "fbgemm_fp8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "quark": "Quark",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
# key that no other method has -> the method, where quant_method is not said
_SIGNS = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "desc_act": "gptq",
    "zero_point": "awq",
    "quant_algo": "modelopt",
    "config_groups": "compressed-tensors",
    "weight_block_size": "fp8",
}
EXPECTED = "expected float32, float16 or bfloat16, fp8 with scales, or mlx-lm's own quantization"


def said(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The key of config.json that says how weights are quantized, and its value; None if none does."""
    return next(((key, values[key]) for key in KEYS if values.get(key)), None)


def is_mlx_lm(values: Mapping[str, Any]) -> bool:
    """Whether config.json says it as mlx-lm does."""
    return isinstance(values.get("quantization"), dict) and "quant_method" not in values["quantization"]


def method_of(scheme: Any) -> str:
    """quant_method, or what the keys tell; '' if nothing does."""
    if not isinstance(scheme, Mapping):
        return ""
    method = scheme.get("quant_method") or next((name for sign, name in _SIGNS.items() if sign in scheme), "")
    return str(method).lower().replace("_", "-") if method in ("compressed_tensors", "auto_round") else str(method)


def describe(scheme: Any) -> str:
    """The method in words, with its variant: ``GPTQ, 4 bits``."""
    method = method_of(scheme)
    if not method:
        return "a method that is not named"
    made = [_NAMES.get(method, method)]
    bits = scheme.get("bits", scheme.get("w_bit", scheme.get("nbits")))
    if scheme.get("load_in_4bit") or scheme.get("load_in_8bit"):
        bits = 4 if scheme.get("load_in_4bit") else 8
    if type(bits) is int:
        made.append(f"{bits} bits")
    variant = scheme.get("quant_algo") or (scheme.get("format") if method == "compressed-tensors" else None)
    return ", ".join([*made, str(variant)] if variant else made)


def fp8_block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the method is fp8 of a kind that is read; () for no blocks.

    None: it is another method.
    """
    method = method_of(scheme)
    block = scheme.get("weight_block_size")
    if method == "compressed-tensors":
        groups = scheme.get("config_groups")
        kinds = [each.get("weights") for each in groups.values()] if isinstance(groups, Mapping) else []
        if scheme.get("format") not in ("float-quantized", "naive-quantized") or not kinds:
            return None
        sparse = scheme.get("sparsity_config") or {}
        if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
            return None
        tables = [kind for kind in kinds if isinstance(kind, Mapping)]
        if kinds != tables or any((kind.get("type"), kind.get("num_bits")) != ("float", 8) for kind in tables):
            return None
        block = next((kind["block_structure"] for kind in tables if kind.get("block_structure")), None)
    elif method == "modelopt":
        if not str(scheme.get("quant_algo")).startswith("FP8"):
            return None
    elif method not in ("fp8", "fbgemm_fp8"):
        return None
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return 0, 0
