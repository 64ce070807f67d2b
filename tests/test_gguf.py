"""GGUF in and out: the same bits, the same model in transformers, in the gguf package and in mx.load."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import ml_dtypes
import mlx.core as mx
import models
import numpy as np
import pytest
import torch
import transformers
from compare import agree

from convert.formats.gguf import blocks
from convert.formats.gguf import model as gguf
from convert.formats.gguf.file import PIECE, Value, read_gguf, read_stored, write_gguf
from convert.formats.gguf.names import arch_of, name_of
from convert.formats.opened import Opened, Options, Tensor
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params, rotary

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def opened(config: ModelConfig, dtype: Any = np.float32, **fields: Any) -> Opened:
    """A model in memory, whose weights have no structure."""
    arrays = {name: array.astype(dtype) for name, array in models.weights(config).items()}
    return of(config, arrays, **fields)


def of(config: ModelConfig, arrays: dict[str, np.ndarray], **fields: Any) -> Opened:
    def lazy(array: np.ndarray) -> Tensor:
        return Tensor(array.shape, array.dtype, lambda: array)

    return Opened(
        Path("model"), "hf", config, {name: lazy(arrays[name]) for name in params.table(config)}, (), **fields
    )


def arrays_of(model: Opened) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in model.tensors.items()}


def assert_same(found: Opened, expected: Opened) -> None:
    """The same names, dtypes and bits."""
    assert found.config == expected.config
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        array = found.tensors[name].read()
        assert found.tensors[name].dtype == array.dtype == tensor.dtype, name
        assert found.tensors[name].shape == array.shape == tensor.shape, name
        assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(tensor.read()).tobytes(), name


def rewritten(source: Path, place: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with its metadata and tensors changed, written anew with the package's own writer."""
    values, stored = read_gguf(source)
    tensors = {name: read_stored(one) for name, one in stored.items()}
    change(values, tensors)
    writer = package.GGUFWriter(place, values["general.architecture"])
    reader = package.GGUFReader(source)
    for key, value in values.items():
        if key == "general.architecture":
            continue
        types = reader.fields[key].types if key in reader.fields else []
        if isinstance(value, str):
            types = []
        if isinstance(value, np.ndarray):
            writer.add_key_value(key, value.tolist(), package.GGUFValueType.ARRAY, sub_type=types[1])
        elif types:
            writer.add_key_value(key, value, types[0], sub_type=types[1] if len(types) > 1 else None)
        else:
            writer.add_key_value(key, value, package.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        bf16 = array.dtype == ml_dtypes.bfloat16
        kind = package.GGMLQuantizationType.BF16 if bf16 else None
        writer.add_tensor(name, array.view(np.uint8) if bf16 else array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def without_ours(values: dict[str, Any], tensors: dict[str, Any]) -> None:
    """As another program writes it."""
    for key in [key for key in values if key.startswith(("mlxgpt.", "tokenizer.huggingface"))]:
        del values[key]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", models.CASES)
def test_there_and_back_is_the_same_bits(case: str, dtype: str, tmp_path: Path) -> None:
    model = opened(models.CASES[case], DTYPES[dtype])
    gguf.write(model, tmp_path / "a.gguf", Options())
    assert gguf.recognize(tmp_path / "a.gguf")
    assert_same(gguf.read(tmp_path / "a.gguf"), model)


@pytest.mark.parametrize("case", models.VARIANTS)
def test_every_variant_comes_back(case: str, tmp_path: Path) -> None:
    model = opened(models.VARIANTS[case])
    unknown = {"gpt_neo": "llama.cpp has no family gpt_neo", "dynamic": "rope_scaling = dynamic cannot be written"}
    for what in (model.config.family, model.config.rope_scaling):
        if what in unknown:
            with pytest.raises(UserError, match=unknown[what]):
                gguf.write(model, tmp_path / "a.gguf", Options())
            assert not (tmp_path / "a.gguf").exists()
            return
    gguf.write(model, tmp_path / "a.gguf", Options())
    assert_same(gguf.read(tmp_path / "a.gguf"), model)


SCALED = ["llama-yarn", "gpt_neox-yarn", "phi3-longrope", "phi3-longrope-window"]


@pytest.mark.parametrize("case", SCALED)
def test_yarn_and_longrope_are_said_as_llama_cpp_reads_them(case: str, tmp_path: Path) -> None:
    model = opened(models.VARIANTS[case])
    config = model.config
    notes = gguf.write(model, tmp_path / "ours.gguf", Options())
    values, stored = read_gguf(tmp_path / "ours.gguf")
    scaling = {key.partition(".rope.scaling.")[2]: value for key, value in values.items() if ".rope.scaling." in key}
    assert scaling["original_context_length"] == config.rope_original
    if config.rope_scaling == "yarn":
        assert (scaling["type"], scaling["factor"]) == ("yarn", 4.0)
    else:
        assert scaling["attn_factor"] == np.float32(rotary.attention(config))
        for name, expected in (("long", config.rope_long), ("short", config.rope_short)):
            array = read_stored(stored[f"rope_factors_{name}.weight"])
            assert array.tolist() == np.array(expected, np.float32).tolist()
        assert any("chooses longrope's factors by its context" in note for note in notes)
    assert any("beta_fast 32" in note for note in notes) == (case == "gpt_neox-yarn")
    found = gguf.read(rewritten(tmp_path / "ours.gguf", tmp_path / "other.gguf", without_ours))
    said = [field for field in found.config.__dataclass_fields__ if field.startswith(("rope", "rotary"))]
    assert [getattr(found.config, name) for name in said] == [getattr(config, name) for name in said]


def test_a_factor_of_yarn_goes_through_llama_cpps_own(tmp_path: Path) -> None:
    config = models.tiny(family="llama", rope_attention=1.3, **models.LONG, **models.YARN)
    gguf.write(opened(config), tmp_path / "a.gguf", Options())
    values, _ = read_gguf(tmp_path / "a.gguf")
    assert values["llama.rope.scaling.attn_factor"] * (0.1 * np.log(4) + 1) == pytest.approx(1.3)
    found = gguf.read(rewritten(tmp_path / "a.gguf", tmp_path / "other.gguf", without_ours)).config
    assert found.rope_attention == pytest.approx(1.3, rel=1e-6)


# what the standard keys do not say, and is something else without our key
UNSAID = {
    "gpt2-nobias-erf": "activation and zero biases",
    "llama-bias": "activation and zero biases",
    "gpt_neox": "",
    "gemma2": "scale of attention scores",
    "smollm3": "layers without rope",
}


@pytest.mark.parametrize("case", models.CASES)
def test_without_our_key_the_standard_ones_say_the_model(case: str, tmp_path: Path) -> None:
    model = opened(models.CASES[case])
    gguf.write(model, tmp_path / "ours.gguf", Options())
    found = gguf.read(rewritten(tmp_path / "ours.gguf", tmp_path / "other.gguf", without_ours))
    if UNSAID.get(case):
        assert found.config != model.config
    else:
        assert found.config == model.config
    for name, array in arrays_of(model).items():
        if found.config.norm == "rms1" and array.ndim == 1:  # 1 + w was rounded
            np.testing.assert_allclose(found.tensors[name].read(), array, atol=1e-7)
        else:
            assert np.array_equal(found.tensors[name].read(), array), name


@pytest.mark.parametrize("case", models.CASES)
def test_the_gguf_package_reads_names_and_shapes(case: str, tmp_path: Path) -> None:
    config = models.CASES[case]
    gguf.write(opened(config), tmp_path / "a.gguf", Options())
    reader = package.GGUFReader(tmp_path / "a.gguf")
    arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == arch_of(config))
    known = {
        package.TENSOR_NAMES[kind].replace("{bid}", str(n)) for kind in package.MODEL_TENSORS[arch] for n in (0, 1)
    } | {package.TENSOR_NAMES[package.MODEL_TENSOR.ROPE_FREQS]}
    shapes = {name_of(config, name): param.shape for name, param in params.table(config).items()}
    found = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    assert {name.rpartition(".")[0] for name in found} <= known
    assert shapes.items() <= found.items()
    field = reader.get_field(f"{arch_of(config)}.block_count")
    assert field is not None and field.contents() == config.n_layer


@pytest.mark.parametrize("bits", [0, 8])
def test_mlx_reads_the_same_arrays(bits: int, tmp_path: Path) -> None:
    gguf.write(opened(models.tiny(family="qwen3", n_embd=64)), tmp_path / "a.gguf", Options(bits=bits))
    found = mx.load(str(tmp_path / "a.gguf"))
    assert isinstance(found, dict)
    _, stored = read_gguf(tmp_path / "a.gguf")
    plain = [name for name, one in stored.items() if one.type == "F32"]
    assert plain and (bits == 0) == (len(plain) == len(stored))
    for name in plain:
        assert np.array_equal(np.array(found[name]), read_stored(stored[name]))
    for name in set(stored) - set(plain):
        module = name.removesuffix(".weight")
        parts = [found[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases")]
        array = np.array(mx.dequantize(*parts, group_size=32, bits=8).astype(mx.float32))
        agree(name, array, read_stored(stored[name]), 2e-3)  # scales are float16 there, and so is its arithmetic


# transformers' loader takes what is not in its mapping from the class's defaults, so these sizes are those
LOADED = {
    "llama": models.tiny(family="llama", n_kv_head=2, tied=False),
    "qwen2": models.tiny(family="qwen2", n_kv_head=2),
    "qwen3": models.tiny(family="qwen3", n_head=2, head_dim=128),
    "gemma2": models.tiny(
        family="gemma2", n_kv_head=2, head_dim=16, attn_scale=256**-0.5, window=12, window_layers=[0]
    ),
    "gemma3_text": models.tiny(
        family="gemma3_text", n_kv_head=2, head_dim=16, attn_scale=256**-0.5, norm_eps=1e-6, window=12
    ),
    "phi3": models.tiny(family="phi3", n_kv_head=2, tied=False, norm_eps=1e-5),
    "gpt2": models.tiny(family="gpt2", block_size=1024),
}


@pytest.mark.parametrize("case", LOADED)
def test_transformers_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    config = LOADED[case]
    model = opened(config, companions=byte_level(config.vocab_size), extra={"eos_token_id": 1, "pad_token_id": 0})
    gguf.write(model, tmp_path / "a.gguf", Options())
    model_folder.write_model(tmp_path / "folder", config, arrays_of(model))
    tokens = torch.arange(24)[None] * 7 % config.vocab_size
    logits = []
    for place, name in ((tmp_path / "folder", None), (tmp_path, "a.gguf")):
        made = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name, attn_implementation="eager")
        with torch.no_grad():
            logits.append(made.eval()(tokens).logits.numpy())
    agree(case, logits[1], logits[0], 1e-6)


def byte_level(n_vocab: int) -> dict[str, Path | bytes]:
    """A tokenizer of the words w0, w1 ..., so that transformers counts the rows right."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {chr(33 + i): i for i in range(n_vocab)}, "merges": []},
    }
    return {"tokenizer.json": json.dumps(content).encode()}


@pytest.mark.parametrize("options", [Options(), Options(bits=8), Options(dtype="bfloat16")], ids=["same", "q8", "bf16"])
def test_one_tensor_at_a_time(options: Options, tmp_path: Path) -> None:
    """The peak is that of the largest tensor, of which there are ten, beside pieces of a fixed size."""
    config = models.tiny(family="llama", n_layer=3, n_embd=512, n_hidden=4096, n_head=8, vocab_size=4096)
    made = {
        name: Tensor(param.shape, np.dtype(np.float32), lambda shape=param.shape: np.ones(shape, np.float32))
        for name, param in params.table(config).items()
    }
    largest = 4 * max(int(np.prod(param.shape)) for param in params.table(config).values())
    tracemalloc.start()
    try:
        gguf.write(Opened(Path("model"), "hf", config, made, ()), tmp_path / "a.gguf", options)
        found = gguf.read(tmp_path / "a.gguf")
        for tensor in found.tensors.values():
            tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * largest + 8 * 4 * PIECE, peak / largest


def random_blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Bytes (rows, ...) of a type that only llama.cpp writes, with scales that are finite."""
    block = blocks.readable()[kind]
    made = np.random.default_rng(1).integers(0, 256, (rows, width // block.values, block.bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)  # at the start or the end of a block
    for at in (0, 2, -4, -2):
        made[..., block.bytes + at if at < 0 else at :][..., :2] = scale
    return made.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q4_1", "Q5_1"])
def test_a_file_of_any_quantized_type_is_read_exactly(kind: str, tmp_path: Path) -> None:
    config = models.tiny(family="llama", n_embd=256, n_hidden=256, n_kv_head=2)
    source = opened(config)
    gguf.write(source, tmp_path / "a.gguf", Options())
    number = package.GGMLQuantizationType[kind]
    values, stored = package.GGUFReader(tmp_path / "a.gguf"), {}
    writer = package.GGUFWriter(tmp_path / "b.gguf", "llama")
    for field in values.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture")):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in values.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        raw = random_blocks(kind, *tensor.data.shape)
        stored[tensor.name] = package.quants.dequantize(raw, number)
        writer.add_tensor(tensor.name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.read(tmp_path / "b.gguf").tensors
    for name in ("token_embd.weight", "blk.1.ffn_down.weight", "blk.0.attn_v.weight"):
        ours = next(each for each in found if name_of(config, each) == name)
        assert np.isfinite(stored[name]).all() and np.array_equal(found[ours].read(), stored[name]), name


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_a_quantized_type_is_written_as_the_package_does_and_stable(kind: str, tmp_path: Path) -> None:
    config = models.tiny(family="gpt2", n_embd=64)  # no rows are permuted
    source = opened(config)
    gguf.write(source, tmp_path / "a.gguf", Options(gguf_type=kind))
    number = package.GGMLQuantizationType[kind.upper()]
    matrices = {
        tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "a.gguf").tensors if tensor.data.ndim > 1
    }
    assert {tensor.tensor_type for tensor in matrices.values()} - {package.GGMLQuantizationType.F32} == {number}
    weight = arrays_of(source)["h.0.mlp.c_fc.weight"]
    assert np.array_equal(matrices["blk.0.ffn_up.weight"].data, package.quants.quantize(weight, number))
    first = gguf.read(tmp_path / "a.gguf")
    gguf.write(first, tmp_path / "b.gguf", Options(gguf_type=kind))
    assert_same(gguf.read(tmp_path / "b.gguf"), first)
    error = np.abs(first.tensors["h.0.mlp.c_fc.weight"].read() - weight)
    assert (error <= blocks.largest_error(weight, kind.upper())).all() and error.any()


def test_bits_stand_for_a_type_and_must_agree_with_it(tmp_path: Path) -> None:
    source = opened(models.tiny(family="llama", n_embd=64, n_kv_head=2))
    for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
        gguf.write(source, tmp_path / f"{bits}.gguf", Options(bits=bits))
        values, stored = read_gguf(tmp_path / f"{bits}.gguf")
        assert stored["blk.0.ffn_up.weight"].type == kind
        assert values["general.file_type"] == package.LlamaFileType[f"MOSTLY_{kind}"]
    with pytest.raises(UserError, match="--gguf-type q4_1 with --bits 8, which is Q8_0: expected one"):
        gguf.write(source, tmp_path / "c.gguf", Options(bits=8, gguf_type="q4_1"))


def test_rows_that_are_no_whole_blocks_stay_and_it_is_said(tmp_path: Path) -> None:
    config = models.tiny(family="llama", n_embd=48, n_hidden=64)
    notes = gguf.write(opened(config), tmp_path / "a.gguf", Options(bits=8))
    assert any("not quantized" in note for note in notes)
    _, stored = read_gguf(tmp_path / "a.gguf")
    assert (stored["blk.0.ffn_down.weight"].type, stored["blk.0.ffn_up.weight"].type) == ("Q8_0", "F32")


@pytest.mark.parametrize("case", ["llama", "qwen3", "phi3"])
def test_a_dtype_is_for_matrices(case: str, tmp_path: Path) -> None:
    gguf.write(opened(models.CASES[case]), tmp_path / "a.gguf", Options(dtype="bfloat16"))
    _, stored = read_gguf(tmp_path / "a.gguf")
    assert {(one.type, len(one.shape)) for one in stored.values()} == {("BF16", 2), ("F32", 1)}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("gpt2-nobias-erf", "llama.cpp computes gelu_tanh in gpt2, this model has gelu"),
        ("mistral", "llama.cpp sees everything in llama, this model has a window of 12 tokens"),
        ("smollm3", "every 4th layer"),
        ("gemma2", "no other scale of attention scores"),
        ("starcoder2", "cannot load starcoder2 without out_bias and mlp_bias"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_said(case: str, says: str, tmp_path: Path) -> None:
    assert any(says in note for note in gguf.write(opened(models.CASES[case]), tmp_path / "a.gguf", Options()))


@pytest.mark.parametrize("case", ["llama", "llama-llama3", "qwen2", "qwen3", "phi3"])
def test_nothing_is_said_where_llama_cpp_does_the_same(case: str, tmp_path: Path) -> None:
    assert gguf.write(opened(models.CASES[case]), tmp_path / "a.gguf", Options()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config = models.CASES["llama"]
    arrays = models.weights(config)
    arrays["h.1.mlp.c_fc.weight"][3, 5] = np.nan
    with pytest.raises(UserError, match="h.1.mlp.c_fc.weight has values that are not finite"):
        gguf.write(of(config, arrays), tmp_path / "a.gguf", Options())
    gguf.write(of(config, arrays), tmp_path / "a.gguf", Options(allow_nan=True))
    arrays["h.1.mlp.c_fc.weight"][3, 5] = 1e6
    with pytest.raises(UserError, match="h.1.mlp.c_fc.weight: values do not fit F16"):
        gguf.write(of(config, arrays), tmp_path / "b.gguf", Options(dtype="float16"))


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("llama", lambda v, t: v.update({"llama.rope.freq_base": 500.0}), "llama.rope.freq_base = 500.0, expected 1"),
        ("llama", lambda v, t: v.update({"llama.attention.head_count": 2}), "head_count = 2, expected 4"),
        (
            "llama",
            lambda v, t: v.update({"general.architecture": "qwen2"}),
            "'qwen2', expected 'llama' by mlxgpt.config",
        ),
        ("llama", lambda v, t: v.update({"mlxgpt.config": "{"}), "mlxgpt.config: not JSON"),
        ("llama", lambda v, t: v.pop("llama.block_count"), "llama.block_count = None, expected 2"),
        ("llama", lambda v, t: t.pop("blk.1.attn_q.weight"), "tensor blk.1.attn_q.weight is missing"),
        ("llama", lambda v, t: t.update(more=np.zeros(3, np.float32)), "unexpected tensor more [3]"),
        ("llama-llama3", lambda v, t: t.pop("rope_freqs.weight"), "rope_freqs.weight is missing"),
        ("llama-llama3", lambda v, t: t["rope_freqs.weight"].fill(2), "rope_freqs.weight differs"),
        (
            "gemma",
            lambda v, t: t["output_norm.weight"].fill(2),
            "output_norm.weight is not 1 + mlxgpt.norm.output_norm",
        ),
        ("gpt2-nobias-erf", lambda v, t: t["output_norm.bias"].fill(2), "output_norm.bias is not zero"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(case: str, change: Any, says: str, tmp_path: Path) -> None:
    gguf.write(opened(models.CASES[case]), tmp_path / "a.gguf", Options())
    place = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)
    with pytest.raises(UserError) as raised:
        arrays_of(gguf.read(place))
    assert says in str(raised.value) and str(place) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("llama", lambda v, t: v.update({"general.architecture": "mamba"}), "general.architecture = 'mamba'"),
        ("llama", lambda v, t: v.pop("llama.block_count"), "metadata key llama.block_count is missing"),
        ("llama", lambda v, t: v.update({"llama.block_count": 1 << 31}), "llama.block_count = 2147483648"),
        ("llama", lambda v, t: v.update({"llama.expert_count": 8}), "llama.expert_count = 8 is not supported"),
        ("llama", lambda v, t: v.update({"llama.rope.scaling.type": "longrope"}), "rope.scaling.type = 'longrope'"),
        ("llama", lambda v, t: v.update({"llama.rope.dimension_count": 6}), "rope.dimension_count = 6"),
        ("llama", lambda v, t: v.update({"llama.context_length": "long"}), "context_length = 'long': expected int"),
        ("llama-llama3", lambda v, t: t["rope_freqs.weight"].__setitem__(0, 3), "no llama3 scaling"),
        ("gemma3_text", lambda v, t: v.update({"gemma3.attention.sliding_window_pattern": [True]}), "2 booleans"),
    ],
)
def test_another_programs_file_is_refused_by_name(case: str, change: Any, says: str, tmp_path: Path) -> None:
    gguf.write(opened(models.CASES[case]), tmp_path / "a.gguf", Options())

    def both(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        without_ours(values, tensors)
        change(values, tensors)

    place = rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", both)
    with pytest.raises(UserError) as raised:
        arrays_of(gguf.read(place))
    assert says in str(raised.value) and str(place) in str(raised.value) and "\n" not in str(raised.value)


def small(path: Path) -> bytes:
    """A file of one string, one array and two tensors."""
    values = {"general.architecture": Value("str", "llama"), "a": Value("u32[]", [1, 2, 3])}
    tensors = {"x": ("F32", (4, 8)), "y": ("F32", (8,))}
    write_gguf(path, values, tensors, lambda name: iter([np.zeros(128 if name == "x" else 32, np.uint8)]))
    return path.read_bytes()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def at(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


BIG = (1 << 60).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: at(d, 0, b"GGML"), "magic b'GGML', expected b'GGUF'"),
        (lambda d: b"", "magic b'', expected b'GGUF'"),
        (lambda d: at(d, 4, b"\0\0\0\3"), "big-endian"),
        (lambda d: at(d, 4, b"\1"), "GGUF version 1, expected 2 or 3"),
        (lambda d: at(d, 8, BIG), "number of tensors: 1152921504606846976 of at least 24 bytes"),
        (lambda d: at(d, 16, BIG), "number of metadata values: 1152921504606846976"),
        (lambda d: at(d, 24, BIG), "metadata key at byte 32 takes 1152921504606846976 bytes"),
        (lambda d: d[:90], "truncated: "),
        (lambda d: d[:-1], "y: truncated: data ends at byte"),
        (lambda d: d + bytes(40), "expected"),
        (lambda d: replaced(d, b"\1\0\0\0\0\0\0\0y", b"\1\0\0\0\0\0\0\0x"), "tensor x is there twice"),
        (lambda d: replaced(d, b"\1\0\0\0\0\0\0\0a", b"\1\0\0\0\0\0\0\0\xff"), "metadata key: not UTF-8"),
        (lambda d: replaced(d, b"y\1\0\0\0", b"y\5\0\0\0"), "y: 5 dimensions, expected 1 to 4"),
        (lambda d: at(d, d.index(b"y\1\0") + 13, b"\x09"), "y is Q8_1, expected one of F32, F16, BF16, Q4_0"),
        (lambda d: at(d, d.index(b"y\1\0") + 13, b"\x63"), "y is of type 99"),
        (lambda d: at(d, d.index(b"y\1\0") + 5, BIG), "y: truncated"),
        (lambda d: at(d, d.index(b"y\1\0") + 17, b"\x20"), "y: data starts at byte"),
        (lambda d: at(d, d.index(b"y\1\0") + 5, bytes(8)), "y: shape [0]: expected positive numbers"),
    ],
)
def test_a_damaged_header_is_one_line(change: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    place = tmp_path / "a.gguf"
    place.write_bytes(change(small(place)))
    with pytest.raises(UserError) as raised:
        read_gguf(place)
    assert says in str(raised.value) and str(raised.value).startswith(f"{place}: ") and "\n" not in str(raised.value)
