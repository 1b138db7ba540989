"""Two language models of Hugging Face, small and with random weights, and their forward passes by hand."""

import math

import torch
from hand_forwards import Model, linear, step
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def gpt2():
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def llama():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def heads_of(x, size):
    """(batch, time, heads · size) -> (batch, heads, time, size)."""
    return x.reshape(*x.shape[:2], -1, size).transpose(1, 2)


def attention(q, k, v):
    """softmax(q·kᵀ / sqrt(size) + causal mask)·v for each head, the heads side by side again."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).flatten(2)


def layer_norm(layer):
    """(x − mean) / sqrt(var + ε) · γ + β."""

    def normed(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    return normed


def conv1d(layer):
    return lambda x: x @ layer.weight + layer.bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hand_gpt2(m, ids, at):
    ids = at(">", ids)
    core, weight = m.transformer, m.transformer.wte.weight  # the head has the weight of the embedding
    h = step(at, "transformer.wte", ids, lambda i: weight[i])
    h = h + at("transformer.wpe", core.wpe.weight[: ids.shape[1]][None])
    h = step(at, "transformer.drop", h, lambda v: v)
    for i, block in enumerate(core.h):
        h = gpt2_block(block, h, at, f"transformer.h.{i}")
    h = at("transformer:last_hidden_state", step(at, "transformer.ln_f", h, layer_norm(core.ln_f)))
    return at(":logits", step(at, "lm_head", h, lambda v: v @ weight.T))


def gpt2_block(block, h, at, path):
    h = at(f">{path}", h)
    n = at(f">{path}.attn", step(at, f"{path}.ln_1", h, layer_norm(block.ln_1)))
    q, k, v = (heads_of(x, 8) for x in step(at, f"{path}.attn.c_attn", n, conv1d(block.attn.c_attn)).split(16, -1))
    a = step(at, f"{path}.attn.c_proj", attention(q, k, v), conv1d(block.attn.c_proj))
    a = at(f"{path}.attn:0", step(at, f"{path}.attn.resid_dropout", a, lambda v: v))
    h = a + h
    n = at(f">{path}.mlp", step(at, f"{path}.ln_2", h, layer_norm(block.ln_2)))
    n = step(at, f"{path}.mlp.act", step(at, f"{path}.mlp.c_fc", n, conv1d(block.mlp.c_fc)), gelu)
    return at(path, h + at(f"{path}.mlp", step(at, f"{path}.mlp.c_proj", n, conv1d(block.mlp.c_proj))))


def rms_norm(layer):
    """x / sqrt(mean x² + ε) · γ, the quotient always in single precision."""

    def normed(x):
        single = x.float()
        return layer.weight * (single * (single.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)

    return normed


def turned(x, cos, sin):
    """Rotary embedding: each pair (x_i, x_{i + size/2}) turned by the angle of its place."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos[..., :4] - high * sin[..., :4], high * cos[..., 4:] + low * sin[..., 4:]], -1)


def hand_llama(m, ids, at):
    ids, core = at(">", ids), m.model
    h = step(at, "model.embed_tokens", ids, lambda i: core.embed_tokens.weight[i])
    angles = torch.arange(ids.shape[1])[:, None] / 10000 ** (torch.arange(4) / 4)
    angles = torch.cat([angles, angles], -1)[None]  # in single precision as well
    turn = at("model.rotary_emb:0", angles.cos().to(h.dtype)), at("model.rotary_emb:1", angles.sin().to(h.dtype))
    for i, layer in enumerate(core.layers):
        h = llama_layer(layer, h, at, f"model.layers.{i}", turn)
    h = at("model:last_hidden_state", step(at, "model.norm", h, rms_norm(core.norm)))
    return at(":logits", step(at, "lm_head", h, linear(m.lm_head)))


def llama_layer(layer, h, at, path, turn):
    h, own, mlp = at(f">{path}", h), layer.self_attn, layer.mlp
    n = at(f">{path}.self_attn", step(at, f"{path}.input_layernorm", h, rms_norm(layer.input_layernorm)))
    q, k, v = (
        heads_of(step(at, f"{path}.self_attn.{name}", n, linear(getattr(own, name))), 8)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    a = attention(turned(q, *turn), turned(k, *turn), v)  # two heads of queries share one of keys and values
    h = h + at(f"{path}.self_attn:0", step(at, f"{path}.self_attn.o_proj", a, linear(own.o_proj)))
    n = step(at, f"{path}.post_attention_layernorm", h, rms_norm(layer.post_attention_layernorm))
    n = at(f">{path}.mlp", n)
    gate = step(at, f"{path}.mlp.act_fn", step(at, f"{path}.mlp.gate_proj", n, linear(mlp.gate_proj)), silu)
    n = gate * step(at, f"{path}.mlp.up_proj", n, linear(mlp.up_proj))
    return at(path, h + at(f"{path}.mlp", step(at, f"{path}.mlp.down_proj", n, linear(mlp.down_proj))))


def silu(x):
    return x / (1 + (-x).exp())


def tokens():
    return torch.randint(50, (3, 5))


LANGUAGE = {
    "gpt2": Model(
        gpt2,
        hand_gpt2,
        tokens,
        "transformer.wte transformer.wpe transformer.h.0.attn:0 transformer.h.0 transformer.h.1.mlp.act :logits "
        "> >transformer.h.1 >transformer.h.0.ln_1",
        "transformer.h.0.attn:0 to transformer.h.1.attn:0, transformer.wte to transformer.h.0.mlp, "
        "transformer.h.0 to >transformer.ln_f",
        "transformer.wte transformer.h.0.attn.c_proj transformer.h.0",
        {"input": "input_ids"},
        outputs=(("output", "logits"),),
    ),
    "llama": Model(
        llama,
        hand_llama,
        tokens,
        "model.rotary_emb:0 model.layers.0.self_attn.k_proj model.layers.0 model:last_hidden_state "
        "> >model.layers.0.self_attn >model.layers.1.post_attention_layernorm",
        "model.layers.0.mlp to model.layers.1.mlp, model.embed_tokens to >model.layers.1.self_attn, "
        "model.rotary_emb:0 to model.rotary_emb:1",
        "model.embed_tokens model.layers.0.self_attn.o_proj model.layers.0",
        outputs=(("output", "logits"),),
    ),
}
