"""Small networks for the tests of patching, written out by hand."""

import torch
from torch import nn


class HandAttention(nn.Module):
    """Attention of several heads, one tensor a step; its weights pass through a module, so that they can be read."""

    def __init__(self, width, heads, *, causal=False, bias=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.weights = nn.Identity()
        self.heads, self.causal, self.bias = heads, causal, bias

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if self.bias is not None:
            logits = logits + self.bias
        if self.causal:
            logits = logits + torch.full_like(logits, -torch.inf).triu(1)
        z = self.weights(logits.softmax(-1)) @ v
        return self.o_proj(z.transpose(-3, -2).flatten(-2))


class HandBlock(nn.Module):
    def __init__(self, width, heads, *, causal=False, bias=None):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), HandAttention(width, heads, causal=causal, bias=bias)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(self.act(self.up(x)))


class HandTransformer(nn.Module):
    """Two blocks over positions; the mean over positions is read off."""

    def __init__(self, *, width=4, heads=2, causal=False, bias=None, blocks=2):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.h = nn.ModuleList(HandBlock(width, heads, causal=causal, bias=bias) for _ in range(blocks))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.h:
            x = block(x)
        return self.head(x.mean(1))
