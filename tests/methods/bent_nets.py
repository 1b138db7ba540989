"""Small networks with two ways to run: as they are, and with detached factors, as the paper on RelP bends them."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def bent(f, x):
    """The identity rule: x times a constant."""
    return x * (f(x) / x).detach()


def halved(value):
    return value / 2 + value.detach() / 2


def layer_normed(norm, x):
    spread = x - x.mean(-1, keepdim=True)
    return spread / (spread.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach() * norm.weight + norm.bias


def rms_normed(weight, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).detach() * weight


def group_normed(norm, x):
    parts = x.reshape(len(x), norm.num_groups, -1)
    spread = parts - parts.mean(-1, keepdim=True)
    spread = spread / (spread.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return spread.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


class Pair(nn.Module):
    """A network that is bent where its rule is True."""

    rule = False


class Smooth(Pair):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        a = self.first(x)
        b = self.second(bent(F.gelu, a) if self.rule else F.gelu(a))
        return self.head(bent(torch.tanh, b) if self.rule else b.tanh())


class InPlace(Pair):
    """What a function does in place is followed where its result is not taken."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        a = self.first(x)
        if self.rule:
            b = bent(F.elu, self.second(bent(torch.tanh, a)))
            return self.head(bent(torch.tanh, halved(halved(b * b) * x[:, :1])))
        a.tanh_()
        b = self.second(a)
        F.elu(b, inplace=True)
        c = b * b
        c.mul_(x[:, :1])
        return self.head(c.tanh_())


class Normed(Pair):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        a = self.first(x)
        return self.head(layer_normed(self.norm, a) if self.rule else self.norm(a))


class SpeltOut(Pair):
    """Normalisations that a forward spells out, and torch's own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale, self.norm, self.head = nn.Parameter(torch.randn(6)), nn.RMSNorm(6, 1e-6), nn.Linear(6, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        a = self.first(x)
        if self.rule:
            b = self.second(rms_normed(self.scale, a))
            c = self.third((b - b.mean(-1, keepdim=True)) / b.std(-1, keepdim=True).detach())
            return self.head(rms_normed(self.norm.weight, c))
        b = self.second(a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)
        c = self.third((b - b.mean(-1, keepdim=True)) / b.std(-1, keepdim=True))
        return self.head(self.norm(c))


class Inverses(Pair):
    """Deviations turned over in other words."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        a = self.first(x)
        if self.rule:
            b = self.second(rms_normed(1, a))
            return self.head(rms_normed(1, b))
        b = self.second(a * (a.square().mean(-1, keepdim=True) + 1e-6) ** -0.5)
        return self.head(b * (1 / ((b * b).mean(-1, keepdim=True) + 1e-6).sqrt()))


class Images(Pair):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Linear(16, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        a = self.conv(x)
        return self.head((group_normed(self.norm, a) if self.rule else self.norm(a)).flatten(1))


class Gated(Pair):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.square = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        u, g = self.up(x), self.gate(x)
        h = self.square(halved(bent(F.silu, g) * u) if self.rule else F.silu(g) * u).relu()
        return self.head((halved(h * h) if self.rule else h**2) + h)


class GatedInOne(Pair):
    """GLU, whose gate counts its value at zero as a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.glu, self.head = nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        if not self.rule:
            return self.head(self.glu(h))
        a, g = h.chunk(2, -1)
        return self.head(halved(a * (bent(lambda v: v.sigmoid() - 0.5, g) + 0.5)))


class Attending(Pair):
    """A block that attends, over three positions with two heads."""

    def __init__(self, how="by hand"):
        super().__init__()
        self.first, self.head, self.how = nn.Linear(4, 4), nn.Linear(4, 2), how
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        q, k, v = (part(x).unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.how == "fused" and not self.rule:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1) / math.sqrt(2)).masked_fill(~torch.ones(3, 3).bool().tril(), -torch.inf)
            weights = F.dropout(scores.softmax(-1), 0.5, training=False)
            weights = weights.detach() if self.rule else weights
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.how == "einsum" else weights @ v
        return self.head((x + self.o(mixed.transpose(1, 2).flatten(2))).mean(1))


class ManyHeads(Pair):
    def __init__(self):
        super().__init__()
        self.first, self.mha = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        if not self.rule:
            return self.head(self.mha(x, x, x)[0].mean(1))
        m = self.mha
        q, k, v = F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(2)).softmax(-1).detach()
        return self.head(m.out_proj((weights @ v).transpose(1, 2).flatten(2)).mean(1))


class Pooled(Pair):
    """Positions weighed by a softmax, in a plain product."""

    def __init__(self):
        super().__init__()
        self.first, self.score, self.head = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        weights = self.score(x).softmax(1)
        return self.head(((weights.detach() if self.rule else weights) * x).sum(1))


class Ending(Pair):
    """A softmax that weighs nothing goes by the gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.first(x)).softmax(-1)


class TwoSoftmaxes(Pair):
    """A product of two weights has nothing else to go to: half to each."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.head = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        found = self.first(x).softmax(-1) * self.other(x).softmax(-1)
        return self.head(halved(found) if self.rule else found)


class Onward(Pair):
    """What was made of a softmax is no weight any more."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.first(x)
        s = h.softmax(-1)
        if self.rule:
            return self.head(halved(bent(torch.tanh, s) * h) + halved((s + h) * h))
        return self.head(s.tanh() * h + (s + h) * h)


class Words(Pair):
    """Whose inputs are integers: a gate between two embeddings."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        found = self.one(x) * self.other(x)
        return self.head((halved(found) if self.rule else found).mean(1))


FLAT, TEXT = (3,), (3, 4)
NETS = {
    "smooth activations": (Smooth, FLAT, ["first", "second", "head"]),
    "in place": (InPlace, FLAT, ["first", "second", "head"]),
    "layer norm": (Normed, FLAT, ["first", "head"]),
    "norms spelt out": (SpeltOut, FLAT, ["first", "second", "third", "head"]),
    "inverses": (Inverses, FLAT, ["first", "second", "head"]),
    "group norm": (Images, (2, 3, 3), ["conv", "head"]),
    "gates": (Gated, FLAT, ["up", "gate", "square", "head"]),
    "glu": (GatedInOne, FLAT, ["first", "head"]),
    "attention": (Attending, TEXT, ["first", "q", "k", "v", "o", "head"]),
    "attention in einsum": (lambda: Attending("einsum"), TEXT, ["first", "q", "k", "v", "o", "head"]),
    "fused attention": (lambda: Attending("fused"), TEXT, ["first", "q", "k", "v", "o", "head"]),
    "many heads": (ManyHeads, TEXT, ["first", "head"]),
    "weighed positions": (Pooled, TEXT, ["first", "score", "head"]),
    "softmax at the end": (Ending, FLAT, ["first", "head"]),
    "two softmaxes": (TwoSoftmaxes, FLAT, ["first", "other", "head"]),
    "softmax and onward": (Onward, FLAT, ["first", "head"]),
    "words": (Words, None, ["one", "other", "head"]),
}
