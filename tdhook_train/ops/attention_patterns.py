"""Attention weights computed again with other queries or keys, and what that does to what the heads give out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tdhook_train.ops.cuts import Part

__all__ = ["Attention", "Side", "attention_like", "in_heads"]

Side = Literal["query", "key"]

_NUMBERS = 1 << 24  # of attention weights at a time


@dataclass(frozen=True)
class Attention:
    """One attention of several heads at some states, in float64.

    Args:
        query: ``[row, head, query, unit]``.
        key: ``[row, head, key, unit]``.
        value: ``[row, head, key, value unit]``.
        logits: scaled products of queries and keys with all that is added to them, ``[row, head, query, key]``; -inf
            where a query does not look.
        scale: of the products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    scale: float

    @property
    def outputs(self) -> Tensor:
        """What the heads give out: ``[row, head, query, value unit]``."""
        return _weights(self.logits) @ self.value

    def off(self, joined: Tensor) -> float:
        """Say how far that is from what was observed, where this is finite: as a share of the largest."""
        known = joined.isfinite()
        size = float(joined[known].abs().max()) if known.any() else 0.0
        return float((self.outputs - joined)[known].abs().nan_to_num(torch.inf).max()) / size if size else 0.0

    def effects(self, kind: Part, side: Side, moved: Tensor, slopes: Tensor) -> Tensor:
        """Estimate what moving parts of the queries or keys does by way of the weights: ``[part, row, slope]``.

        ``Σ (A' - A) · ∂M/∂A`` with A' the softmax with the part replaced, and ``∂M/∂A_ij = ∂M/∂z_i · v_j``.

        Args:
            kind: of the parts: all, units, heads or positions, one at a time.
            side: what is moved.
            moved: by how much, ``[row, head, query or key, unit]``.
            slopes: of some numbers along what the heads give out, ``[slope, row, head, query, value unit]``.
        """
        if kind == "unit":
            return torch.cat(list(self._by_unit(side, moved, slopes)))
        if kind == "position" and side == "key":
            return torch.cat(list(self._by_key(moved, slopes)))
        each = self._effect(self._logits_of(side, moved), slopes)  # [slope, row, head, query]: none depends on another
        if kind == "position":
            return each.sum(2).permute(2, 1, 0)
        heads = each.sum(3).permute(2, 1, 0)
        return heads if kind == "head" else heads.sum(0, keepdim=True)

    def _by_key(self, moved: Tensor, slopes: Tensor) -> Iterator[Tensor]:
        """Move one key position at a time: one column of the logits."""
        change = self._logits_of("key", moved)
        at = torch.arange(change.shape[-1], device=change.device)
        for some in at.split(max(1, _NUMBERS // max(1, change.numel()))):
            columns = torch.where(at == some.view(-1, 1, 1, 1, 1), change, 0)
            yield self._effect(columns, slopes).sum((-2, -1)).permute(0, 2, 1)

    def _by_unit(self, side: Side, moved: Tensor, slopes: Tensor) -> Iterator[Tensor]:
        """Move one unit at a time: it changes the logits of its own head by a matrix of rank one."""
        a, b = (moved, self.key) if side == "query" else (self.query, moved)
        for head in range(self.logits.shape[1]):
            own = self.logits[:, head]
            for some in torch.arange(a.shape[-1], device=a.device).split(max(1, _NUMBERS // max(1, own.numel()))):
                left, right = (value[:, head, :, some].permute(2, 0, 1) for value in (a, b))  # [unit, row, position]
                change = self.scale * left[..., :, None] * right[..., None, :]
                outputs = (_weights(own + change) - _weights(own)) @ self.value[:, head]
                yield torch.einsum("sriv,uriv->urs", slopes[:, :, head], outputs)

    def _logits_of(self, side: Side, moved: Tensor) -> Tensor:
        """Return by how much the logits move: they are linear in queries, and in keys."""
        query, key = (moved, self.key) if side == "query" else (self.query, moved)
        return self.scale * query @ key.mT

    def _effect(self, change: Tensor, slopes: Tensor) -> Tensor:
        """Return ``[…, slope, row, head, query]`` for changes of the logits ``[…, row, head, query, key]``."""
        outputs = (_weights(self.logits + change) - _weights(self.logits)) @ self.value
        return torch.einsum("srhiv,...rhiv->...srhi", slopes, outputs)


def attention_like(joined: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attention:
    """Return the attention that comes nearest to what the heads gave out: to all keys, or to those up to the query.

    Args:
        joined: what the heads gave out, ``[row, head, query, value unit]``.
        query: ``[row, head, query, unit]``.
        key: ``[row, head, key, unit]``.
        value: ``[row, head, key, value unit]``.
        scale: of the products.
    """
    logits = scale * query @ key.mT
    whole = Attention(query, key, value, logits, scale)
    if logits.shape[-1] != logits.shape[-2]:
        return whole
    later = torch.ones_like(logits, dtype=torch.bool).triu(1)
    causal = replace(whole, logits=logits.masked_fill(later, -torch.inf))
    return min(whole, causal, key=lambda one: one.off(joined))


def in_heads(value: Tensor, heads: int) -> Tensor:
    """Bring ``[…, position, unit]`` to ``[…, head, position, unit of the head]``, in float64."""
    return value.double().unflatten(-1, (heads, -1)).transpose(-3, -2)


def _weights(logits: Tensor) -> Tensor:
    """Return the softmax; 0 where a query does not look, also of one that looks nowhere."""
    return logits.softmax(-1).masked_fill(logits == -torch.inf, 0)
