"""A short number that tells which weights or which data were used."""

from __future__ import annotations

import hashlib

import torch
from tensordict import TensorDictBase

__all__ = ["fingerprint"]


def fingerprint(td: TensorDictBase) -> int:
    """Hash the names, shapes, dtypes and bytes of all tensors to a signed 64-bit integer.

    Equal content gives equal numbers on every machine; the order of the keys does not matter.
    """
    digest = hashlib.blake2b(digest_size=8)
    flat = td.flatten_keys(".")
    for key in sorted(flat.keys()):
        value = flat.get(key)
        if not isinstance(value, torch.Tensor):
            continue
        value = value.detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little", signed=True)
