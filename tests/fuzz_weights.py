"""Small models as others store their weights, for fuzz_readers.py: pickled, of Meta's names, in fp8, in mxfp4."""

import json
from pathlib import Path

import ml_dtypes
import models
import numpy as np
import torch

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.folders import model_folder
from mlxgpt.common.folders.tensors import read_tensors, write_tensors
from mlxgpt.common.model import families


def pickled(config: ModelConfig, place: Path, legacy: bool = False, meta: bool = False) -> Path:
    """pytorch_model.bin and config.json, or consolidated.00.pth and params.json, of a llama."""
    state = {
        families.to_foreign(config, name)[0]: torch.from_numpy(each) for name, each in models.weights(config).items()
    }
    (place / "torch").mkdir()
    if meta:
        theirs = {
            "model.": "",
            "self_attn.": "attention.",
            "q_proj": "wq",
            "k_proj": "wk",
            "v_proj": "wv",
            "o_proj": "wo",
        }
        theirs |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "lm_head": "output"}
        theirs |= {
            "mlp.up_proj": "feed_forward.w3",
            "input_layernorm": "attention_norm",
            "embed_tokens": "tok_embeddings",
        }
        theirs |= {"post_attention_layernorm": "ffn_norm"}
        for one, other in theirs.items():
            state = {name.replace(one, other): each for name, each in state.items()}
        params_json = {"dim": config.n_embd, "n_layers": config.n_layer, "n_heads": config.n_head, "vocab_size": -1}
        params_json |= {"n_kv_heads": config.n_kv_head, "norm_eps": 1e-5, "use_scaled_rope": True}
        (place / "torch" / "params.json").write_text(json.dumps(params_json))
    else:
        (place / "torch" / "config.json").write_text(json.dumps(families.config_to_hf(config)))
    name = "consolidated.00.pth" if meta else "pytorch_model.bin"
    torch.save(state, place / "torch" / name, _use_new_zipfile_serialization=not legacy)
    return place / "torch"


def as_fp8(folder: Path) -> Path:
    """A folder with its projections as fp8 in blocks of 32."""
    for file in folder.glob("*.safetensors"):
        arrays = read_tensors(file)
        for name in [name for name in arrays if name.endswith("_proj.weight")]:
            grid = tuple(-(-size // 32) for size in arrays[name].shape)
            arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
            arrays[f"{name}_scale_inv"] = np.full(grid, 0.5, np.float32)
        write_tensors(file, arrays)
    files = {name: file.name for file in folder.glob("*.safetensors") for name in read_tensors(file)}
    (folder / model_folder.INDEX).write_text(json.dumps({"weight_map": files}))
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def as_mxfp4(folder: Path) -> Path:
    """A folder of mlx-lm of 4 bits in groups of 32, said to be of mode mxfp4."""
    file = folder / model_folder.SINGLE
    arrays = {name: each for name, each in read_tensors(file).items() if not name.endswith(".biases")}
    scaled = {name: np.full(each.shape, 120, np.uint8) for name, each in arrays.items() if name.endswith(".scales")}
    write_tensors(file, arrays | scaled, {"format": "mlx"})
    (folder / model_folder.INDEX).unlink()
    values = json.loads((folder / "config.json").read_text())
    values["quantization"] = values["quantization_config"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
