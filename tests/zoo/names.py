"""Naming styles: role -> how a style calls it, and the names of an animal's tensors.

In a pattern {n} is the block, {h} the head and * the leaf: weight, bias, or what the style has for them.
"""

from zoo.choices import Spec

ROLES = ("tok", "pos", "enorm", "block", "ln1", "ln1p", "ln2", "ln2p", "final", "head", "q", "k", "v", "o", "qkv", "kv",
         "hq", "hk", "hv", "up", "down", "gate", "gateup", "qn", "kn")  # fmt: skip


def _style(leaves: str, **patterns: str) -> dict[str, str]:
    """``leaves``: those of a linear layer, a norm (weight and bias each) and an embedding."""
    assert set(patterns) == set(ROLES), set(patterns) ^ set(ROLES)
    return {**patterns, **dict(zip(("W", "B", "G", "S", "E"), leaves.split(), strict=True))}


STYLES: dict[str, dict[str, str]] = {
    "snake": _style(
        "weight bias weight bias weight",
        tok="token_embedding.*", pos="position_embedding.*", enorm="embedding_norm.*", block="transformer_blocks.{n}.",
        ln1="attention_norm.*", ln1p="attention_post_norm.*", ln2="mlp_norm.*", ln2p="mlp_post_norm.*",
        final="output_norm.*", head="output_head.*",
        q="attention.query_proj.*", k="attention.key_proj.*", v="attention.value_proj.*", o="attention.output_proj.*",
        qkv="attention.qkv_proj.*", kv="attention.kv_proj.*", hq="attention.query_heads.{h}.*",
        hk="attention.key_heads.{h}.*", hv="attention.value_heads.{h}.*", up="mlp.up_proj.*", down="mlp.down_proj.*",
        gate="mlp.gate_proj.*", gateup="mlp.gate_up_proj.*", qn="attention.query_norm.*", kn="attention.key_norm.*",
    ),
    "course": _style(
        "weight bias weight bias weight",
        tok="tok_embedding_table.*", pos="pos_embedding_table.*", enorm="ln_emb.*", block="blocks.{n}.",
        ln1="ln1.*", ln1p="ln1_after.*", ln2="ln2.*", ln2p="ln2_after.*", final="ln_final.*", head="lm_head.*",
        q="sa.query.*", k="sa.key.*", v="sa.value.*", o="sa.proj.*", qkv="sa.c_attn.*", kv="sa.key_value.*",
        hq="sa.heads.{h}.query.*", hk="sa.heads.{h}.key.*", hv="sa.heads.{h}.value.*",
        up="ffwd.net.0.*", down="ffwd.net.2.*", gate="ffwd.gate.*", gateup="ffwd.gated.*",
        qn="sa.q_ln.*", kn="sa.k_ln.*",
    ),
    "meta": _style(
        "weight bias weight bias weight",
        tok="tok_embeddings.*", pos="pos_embeddings.*", enorm="embed_norm.*", block="layers.{n}.",
        ln1="attention_norm.*", ln1p="attention_post_norm.*", ln2="ffn_norm.*", ln2p="ffn_post_norm.*",
        final="norm.*", head="output.*", q="attention.wq.*", k="attention.wk.*", v="attention.wv.*",
        o="attention.wo.*", qkv="attention.wqkv.*", kv="attention.wkv.*", hq="attention.wqs.{h}.*",
        hk="attention.wks.{h}.*", hv="attention.wvs.{h}.*", up="feed_forward.w3.*", down="feed_forward.w2.*",
        gate="feed_forward.w1.*", gateup="feed_forward.w13.*", qn="attention.q_norm.*", kn="attention.k_norm.*",
    ),
    "camel": _style(
        "weight bias gamma beta weight",
        tok="tokenEmbedding.*", pos="positionEmbedding.*", enorm="embeddingNorm.*", block="decoderBlocks.{n}.",
        ln1="layerNorm1.*", ln1p="layerNorm1Out.*", ln2="layerNorm2.*", ln2p="layerNorm2Out.*", final="finalNorm.*",
        head="vocabProjection.*", q="selfAttention.queryLayer.*", k="selfAttention.keyLayer.*",
        v="selfAttention.valueLayer.*", o="selfAttention.headMergeLayer.*", qkv="selfAttention.qkvLayer.*",
        kv="selfAttention.keyValueLayer.*", hq="selfAttention.attentionHeads.{h}.Query.*",
        hk="selfAttention.attentionHeads.{h}.Key.*", hv="selfAttention.attentionHeads.{h}.Value.*",
        up="feedForward.expandLayer.*", down="feedForward.contractLayer.*", gate="feedForward.gateLayer.*",
        gateup="feedForward.gateExpandLayer.*", qn="selfAttention.queryNorm.*", kn="selfAttention.keyNorm.*",
    ),
    "opaque": _style(  # what nn.Sequential and ModuleList give; the shapes have to say the rest
        "weight bias weight bias weight",
        tok="0.0.*", pos="0.1.*", enorm="0.2.*", block="1.{n}.", ln1="0.norm.*", ln1p="0.norm_out.*", ln2="1.norm.*",
        ln2p="1.norm_out.*", final="2.0.*", head="2.1.*", q="0.fn.to_q.*", k="0.fn.to_k.*", v="0.fn.to_v.*",
        o="0.fn.to_out.0.*", qkv="0.fn.to_qkv.*", kv="0.fn.to_kv.*", hq="0.fn.to_q.{h}.*", hk="0.fn.to_k.{h}.*",
        hv="0.fn.to_v.{h}.*", up="1.fn.net.0.*", down="1.fn.net.3.*", gate="1.fn.gate.*", gateup="1.fn.net.0.proj.*",
        qn="0.fn.q_norm.*", kn="0.fn.k_norm.*",
    ),
    "lens": _style(
        "W b w b W",
        tok="embed.*_E", pos="pos_embed.*_pos", enorm="ln_embed.*", block="blocks.{n}.", ln1="ln1.*",
        ln1p="ln1_post.*", ln2="ln2.*", ln2p="ln2_post.*", final="ln_final.*", head="unembed.*_U",
        q="attn.*_Q", k="attn.*_K", v="attn.*_V", o="attn.*_O", qkv="attn.*_QKV", kv="attn.*_KV",
        hq="attn.heads.{h}.*_Q", hk="attn.heads.{h}.*_K", hv="attn.heads.{h}.*_V", up="mlp.*_in", down="mlp.*_out",
        gate="mlp.*_gate", gateup="mlp.*_gate_in", qn="attn.q_norm.*", kn="attn.k_norm.*",
    ),
    "encoder": _style(
        "weight bias weight bias weight",
        tok="embedding.*", pos="pos_encoder.embedding.*", enorm="embedding_norm.*",
        block="transformer_encoder.layers.{n}.", ln1="norm1.*", ln1p="norm1_out.*", ln2="norm2.*", ln2p="norm2_out.*",
        final="transformer_encoder.norm.*", head="decoder.*", q="self_attn.q_proj.*", k="self_attn.k_proj.*",
        v="self_attn.v_proj.*", o="self_attn.out_proj.*", qkv="self_attn.in_proj.*", kv="self_attn.kv_proj.*",
        hq="self_attn.{h}.q.*", hk="self_attn.{h}.k.*", hv="self_attn.{h}.v.*", up="linear1.*", down="linear2.*",
        gate="linear_gate.*", gateup="linear_gated.*", qn="self_attn.q_norm.*", kn="self_attn.k_norm.*",
    ),
    "mlx": _style(
        "weight bias weight bias weight",
        tok="embedding.*", pos="position.*", enorm="ln_in.*", block="transformer.layers.{n}.", ln1="ln1.*",
        ln1p="ln1_out.*", ln2="ln2.*", ln2p="ln2_out.*", final="transformer.ln.*", head="out_proj.*",
        q="attention.query_proj.*", k="attention.key_proj.*", v="attention.value_proj.*", o="attention.out_proj.*",
        qkv="attention.qkv_proj.*", kv="attention.kv_proj.*", hq="attention.heads.{h}.query_proj.*",
        hk="attention.heads.{h}.key_proj.*", hv="attention.heads.{h}.value_proj.*", up="linear1.*", down="linear2.*",
        gate="linear3.*", gateup="linear13.*", qn="attention.query_ln.*", kn="attention.key_ln.*",
    ),
    "brief": _style(
        "w b g b w",
        tok="emb.*", pos="pos.*", enorm="n0.*", block="h.{n}.", ln1="n1.*", ln1p="n1b.*", ln2="n2.*", ln2p="n2b.*",
        final="nf.*", head="out.*", q="a.q.*", k="a.k.*", v="a.v.*", o="a.o.*", qkv="a.qkv.*", kv="a.kv.*",
        hq="a.{h}.q.*", hk="a.{h}.k.*", hv="a.{h}.v.*", up="f.i.*", down="f.o.*", gate="f.g.*", gateup="f.gi.*",
        qn="a.qn.*", kn="a.kn.*",
    ),
    "hub": _style(
        "weight bias weight bias weight",
        tok="model.embed_tokens.*", pos="model.embed_positions.*", enorm="model.embed_norm.*",
        block="model.layers.{n}.", ln1="input_layernorm.*", ln1p="input_layernorm_out.*",
        ln2="post_attention_layernorm.*", ln2p="post_feedforward_layernorm.*", final="model.norm.*", head="lm_head.*",
        q="self_attn.q_proj.*", k="self_attn.k_proj.*", v="self_attn.v_proj.*", o="self_attn.o_proj.*",
        qkv="self_attn.qkv_proj.*", kv="self_attn.kv_proj.*", hq="self_attn.q_heads.{h}.*",
        hk="self_attn.k_heads.{h}.*", hv="self_attn.v_heads.{h}.*", up="mlp.up_proj.*", down="mlp.down_proj.*",
        gate="mlp.gate_proj.*", gateup="mlp.gate_up_proj.*", qn="self_attn.q_norm.*", kn="self_attn.k_norm.*",
    ),
    "flax": _style(
        "kernel bias scale bias embedding",
        tok="params/transformer/wte/*", pos="params/transformer/wpe/*", enorm="params/transformer/ln_0/*",
        block="params/transformer/h_{n}/", ln1="ln_1/*", ln1p="ln_1_out/*", ln2="ln_2/*", ln2p="ln_2_out/*",
        final="params/transformer/ln_f/*", head="params/lm_head/*", q="attn/query/*", k="attn/key/*",
        v="attn/value/*", o="attn/out/*", qkv="attn/qkv/*", kv="attn/kv/*", hq="attn/head_{h}/query/*",
        hk="attn/head_{h}/key/*", hv="attn/head_{h}/value/*", up="mlp/fc_in/*", down="mlp/fc_out/*",
        gate="mlp/fc_gate/*", gateup="mlp/fc_gate_in/*", qn="attn/query_norm/*", kn="attn/key_norm/*",
    ),
    "terse": _style(
        "W b g s W",
        tok="*te", pos="*pe", enorm="n0*", block="h{n}/", ln1="n1*", ln1p="n1x*", ln2="n2*", ln2p="n2x*", final="nf*",
        head="*u", q="*q", k="*k", v="*v", o="*o", qkv="*qkv", kv="*kv", hq="head{h}/*q", hk="head{h}/*k",
        hv="head{h}/*v", up="*1", down="*2", gate="*g", gateup="*g1", qn="qn*", kn="kn*",
    ),
    "tf": _style(
        "w b g b w",
        tok="model/wte/*", pos="model/wpe/*", enorm="model/ln_e/*", block="model/h{n}/", ln1="ln_1/*",
        ln1p="ln_1_post/*", ln2="ln_2/*", ln2p="ln_2_post/*", final="model/ln_f/*", head="model/logits/*",
        q="attn/c_q/*", k="attn/c_k/*", v="attn/c_v/*", o="attn/c_proj/*", qkv="attn/c_attn/*", kv="attn/c_kv/*",
        hq="attn/head{h}/q/*", hk="attn/head{h}/k/*", hv="attn/head{h}/v/*", up="mlp/c_fc/*", down="mlp/c_proj/*",
        gate="mlp/c_gate/*", gateup="mlp/c_gate_fc/*", qn="attn/q_ln/*", kn="attn/k_ln/*",
    ),
}  # fmt: skip
"""Name of a style -> its patterns and leaves."""

IN_BLOCK = frozenset(ROLES) - {"tok", "pos", "enorm", "block", "final", "head"}
NORMS = ("enorm", "ln1", "ln1p", "ln2", "ln2p", "final", "qn", "kn")


def name(spec: Spec, role: str, leaf: str, n: int = 0, h: int = 0) -> str:
    """How the animal calls a weight or a bias (leaf "w" or "b") of a role, in block n, of head h.

    The blocks of one that is stacked share a name, without a number.
    """
    style = STYLES[spec.style]
    if spec.qkv == "in_proj" and role == "qkv":
        within = style["o"].split(".")[0] if style["o"].startswith(("attn", "sa", "self", "attention")) else "0.fn"
        return f"{style['block'].format(n=n)}{within}.in_proj_{'weight' if leaf == 'w' else 'bias'}"
    kind = (
        "E" if role in ("tok", "pos") else {"w": "G", "b": "S"}[leaf] if role in NORMS else {"w": "W", "b": "B"}[leaf]
    )
    path = style[role].replace("*", style[kind])
    if role in IN_BLOCK:
        block = style["block"]
        if spec.stacked:
            for before in (".{n}", "_{n}", "{n}"):
                block = block.replace(before, "")
        path = block + path
    return path.format(n=n, h=h)
