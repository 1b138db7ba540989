"""Short names for networks, layers and cells of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

__all__ = ["by_network", "network_name", "short_layers", "thin_out"]

# the networks of a TorchRL loss; members of an ensemble are numbered before their own `module`
_NETWORK = re.compile(r"^((?:\w+_network|actor|critic|policy|qvalue)(?:\.\d+(?=\.module\b))?)\.(.+)$")
_AGENT = re.compile(r":(agent \d+)$")
_KNOWN = {"actor": "policy", "policy": "policy", "critic": "value", "qvalue": "Q", "value": "value"}
_LONGEST = 24  # characters of a path that is shown in place of a class
_PARTS = {"NormalParamExtractor:0": "loc", "NormalParamExtractor:1": "scale"}


def by_network(labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of each network's layers, networks in the order they come; ``""`` for a bare model."""
    found: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        match = _NETWORK.match(label)
        found.setdefault(match[1] if match else "", []).append(position)
    return found


def network_name(network: str) -> str:
    """Return what a reader calls a network: ``actor_network`` is the policy network."""
    if not network:
        return "network"
    stem, _, member = network.partition(".")
    words = stem.removesuffix("_network")
    target = "target " if words.startswith("target_") else ""
    words = words.removeprefix("target_")
    name = f"{target}{_KNOWN.get(words, words.replace('_', ' '))} network"
    return f"{name} {member}".rstrip()


def short_layers(labels: Sequence[str], types: Sequence[str] | None = None) -> list[str]:
    """Return tick labels for the layers of one network: the names that somebody gave, or ``1 Linear``, ``2 Tanh``."""
    paths = _without_what_all_share([match[2] if (match := _NETWORK.match(label)) else label for label in labels])
    if types is not None and len(types) == len(labels) and not all(map(_is_name, paths)):
        kinds = [_PARTS.get(kind, kind) for kind in types]
        agents = [f" {match[1]}" if (match := _AGENT.search(label)) else "" for label in labels]
        return [f"{i} {kind}{agent}" for i, (kind, agent) in enumerate(zip(kinds, agents, strict=True), 1)]
    return [path if _is_name(path) else f"{number} · {path}" for number, path in enumerate(paths, 1)]


def _without_what_all_share(paths: Sequence[str]) -> list[str]:
    if len(paths) < 2:
        return list(paths)
    parents = [path.split(".")[:-1] for path in paths]
    shared = sum(1 for _ in takewhile(lambda segments: len(set(segments)) == 1, zip(*parents, strict=False)))
    return [".".join(path.split(".")[shared:]) for path in paths]


def _is_name(path: str) -> bool:
    """Whether a path is short and says more than numbers and the names of containers do."""
    words = path.split(":")[0].split(".")
    named = any(not (word.isdigit() or word.startswith("_")) for word in words)
    return named and "module" not in words and len(path) <= _LONGEST


def thin_out(labels: Sequence[str], most: int) -> list[int]:
    """Return the positions of at most ``most`` labels, evenly spaced from the first."""
    stride = max(1, -(-len(labels) // most))
    return list(range(0, len(labels), stride))
