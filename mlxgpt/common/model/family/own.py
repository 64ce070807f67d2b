"""The family of this project: any mix of the decoder's choices, for what no published architecture expresses."""

from mlxgpt.common.model.family.row import BIASES, Family, Gguf, MlxLm

_MODULES = (
    *("wte", "wpe", "ln_e", "ln_f", "lm_head"),
    *("h.{n}.ln_1", "h.{n}.ln_1_post", "h.{n}.ln_2", "h.{n}.ln_2_post"),
    *("h.{n}.attn.c_attn", "h.{n}.attn.q_proj", "h.{n}.attn.k_proj", "h.{n}.attn.v_proj", "h.{n}.attn.c_proj"),
    *("h.{n}.attn.q_norm", "h.{n}.attn.k_norm"),
    *("h.{n}.mlp.c_gate_fc", "h.{n}.mlp.c_gate", "h.{n}.mlp.c_fc", "h.{n}.mlp.c_proj"),
)

ROWS: dict[str, Family] = {
    "mlxgpt": Family(
        architecture="MlxgptForCausalLM",
        about="any mix of the fields of [model], by their own names; only this project loads it",
        modules={module: module for module in _MODULES},
        fields={"activation": "activation", "tied": "tied"},
        absent=dict.fromkeys(BIASES, True),
        fixed={},
        biases={name: name for name in BIASES},
        own=True,
        gguf=Gguf(arch=""),
        mlx_lm=MlxLm(loads=False),
    ),
}
