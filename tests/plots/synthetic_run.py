"""Synthetic rows that look like a PPO run on an inverted double pendulum."""

import math

import pandas as pd
import torch

ACTOR = [("actor_network.module.0.module.%d", "Linear"), ("actor_network.module.0.module.%d", "Tanh")]
TARGETS = ["action", "value", "cart position", "cart velocity", "pole 2 velocity"]
FEATURES = ["cart position", "sin θ1", "sin θ2", "cos θ1", "cos θ2", "cart velocity", "pole 1 velocity"]
FEATURES += ["pole 2 velocity", "constraint 1", "constraint 2", "constraint 3"]
TAUS = ["0.1", "0.025"]
WIDTH = 32


def layers(depth=6):
    """Return the labels and classes of the layers of a policy (2 × depth + 3) and a value network (2 × depth + 1)."""
    names, types = [], []
    for network, path in (("actor_network", "module.0.module"), ("critic_network", "module")):
        inner = [f"{network}.{path}.{number}" for number in range(2 * depth + 1)]
        kinds = ["Tanh" if number % 2 else "Linear" for number in range(2 * depth + 1)]
        if network == "actor_network":
            inner += [f"{network}.module.0.module.{2 * depth + 1}:{part}" for part in (0, 1)]
            kinds += ["NormalParamExtractor:0", "NormalParamExtractor:1"]
        names, types = names + inner, types + kinds
    return names, types


def ticks(last=15_680, regular=50):
    """Return the steps of the demo's schedule: geometric ones, and one every 2 % of training."""
    geometric = {0, *(2**power for power in range(int(math.log2(last)) + 1))}
    return sorted(geometric | {round(last * share / regular) for share in range(1, regular + 1)})


def fill(buffer, steps, depth=6, seed=0):
    """Append a row of every artifact for each step."""
    generator = torch.Generator().manual_seed(seed)
    names, types = layers(depth)
    declare(buffer, names, types)
    for step in steps:
        when = {"step": step, "frames": round(step * 50_000 / 15_680), "time": 1.77e9 + step / 100}
        share = math.log1p(step) / math.log1p(15_680)
        buffer.append("probe", probe(names, share, generator), cost=0.037 + 0.2 * (step == 0), **when)
        buffer.append("attribution", attribution(share), cost=0.005, **when)
        buffer.append("patching", patching(names, share, generator), cost=0.0095, **when)
        buffer.append("health", health(names, share, generator), cost=0.002, **when)
    return buffer


def declare(buffer, names, types):
    """Declare the four artifacts of the demo."""
    of_layer = {"layer": names, "layer_type": types}
    scores = ("r2", "r2_pooled", "r2_observation", "r2_initial", "r2_null", "p", "reason")
    coords = {**of_layer, "target": TARGETS}
    settings = {"alphas": 7, "folds": 5, "layers": "**"}
    buffer.declare("probe", dims=dict.fromkeys(scores, ("layer", "target")), coords=coords, settings=settings)
    dims = ("batch", "target", "feature")
    keys = {("actor_network", "attr", "observation"): dims, ("critic_network", "attr", "observation"): dims}
    keys = {key: ("batch", f"{key[0]}.target", "feature") for key in keys}
    outputs = {"actor_network.target": ["action"], "critic_network.target": ["value"]}
    buffer.declare("attribution", dims=keys, coords={"feature": FEATURES, **outputs})
    dims = {"effect": ("layer", "target"), "gap": ("layer", "target"), "unit_effect": ("layer", "unit", "target")}
    buffer.declare("patching", dims=dims, coords={**of_layer, "target": ["action", "value"]})
    dims = dict.fromkeys(("dead", "effective_rank", "effective_rank_centred", "width"), ("layer",))
    buffer.declare("health", dims={"dormant": ("layer", "tau"), **dims}, coords={**of_layer, "tau": TAUS})


def noise(shape, generator, scale=1.0):
    """Return normal noise in float64."""
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def depths(names):
    """Return each layer's relative depth in its network."""
    actor = [name.startswith("actor") for name in names]
    count = {True: sum(actor), False: len(names) - sum(actor)}
    seen = {True: 0, False: 0}
    found = []
    for own in actor:
        found.append(seen[own] / max(count[own] - 1, 1))
        seen[own] += 1
    return torch.tensor(found, dtype=torch.float64), torch.tensor(actor)


def probe(names, share, generator):
    """Return scores: observed quantities fade with depth, the network's own output grows with training."""
    depth, actor = depths(names)
    shape = (len(names), len(TARGETS))
    initial = torch.stack([0.35 - 0.2 * depth, 0.3 - 0.2 * depth, *[0.97 - 0.6 * depth] * 3], -1)
    learned = 1 / (1 + torch.exp(-14 * (share - 0.6 - 0.15 * (1 - depth))))
    own = torch.stack([actor, ~actor], -1).double() * 0.75 + 0.12
    r2 = initial.clone()
    r2[:, :2] += own * learned[:, None] * (0.4 + 0.6 * depth[:, None]) * 0.85
    r2[:, 2:] -= 0.5 * learned[:, None] * depth[:, None]
    r2[:, 4] += 0.4 * learned * (1 - depth)
    r2 = (r2 + noise(shape, generator, 0.015)).clamp(max=0.999)
    null = 0.08 + noise(shape, generator, 0.02).abs()
    observation = torch.tensor([0.45, 0.4, 1.0, 1.0, 1.0], dtype=torch.float64).expand(shape)
    return {
        "r2": r2,
        "r2_pooled": r2 - 0.01,
        "r2_observation": observation.clone(),
        "r2_initial": initial,
        "r2_null": null,
        "p": torch.where(r2 > null, 0.025, 0.4),
        "reason": torch.zeros(shape, dtype=torch.int8),
    }


def attribution(share):
    """Return signed attributions per sample: velocities take over as training goes on."""
    generator = torch.Generator().manual_seed(1)  # the same states at every tick
    start = torch.tensor([0.2, 0.3, 0.3, 0.05, 0.05, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0])
    end = torch.tensor([0.1, 0.9, 1.4, 0.02, 0.03, 0.25, 0.6, 1.1, 0.0, 0.0, 0.0])
    size = start + (end - start) * share**4
    size = size * (1 + 0.04 * math.sin(400 * share))
    draw = [torch.randn(64, 1, len(FEATURES), generator=generator) * size * scale for scale in (0.4, 40.0)]
    return {f"{name}_network": {"attr": {"observation": x}} for name, x in zip(("actor", "critic"), draw, strict=True)}


def patching(names, share, generator):
    """Return effects: the same for every layer of a chain, with units that come to matter."""
    _, actor = depths(names)
    own = torch.stack([actor, ~actor], -1)
    gap = (torch.tensor([0.3, 30.0], dtype=torch.float64) * (0.2 + share**3)).expand(len(names), 2)
    gap = torch.where(own, gap, torch.nan)
    part = (torch.rand(len(names), WIDTH, 2, generator=generator, dtype=torch.float64) * 0.3 * (0.3 + share)) ** 1.5
    unit = part * gap[:, None]
    narrow = torch.tensor([name.rsplit(".", 1)[-1].startswith("13") or name.endswith(".12") for name in names])
    unit[narrow, 2:] = torch.nan
    return {"effect": gap.clone(), "gap": gap.clone(), "unit_effect": unit}


def health(names, share, generator):
    """Return health: rank falls with training, some units of late layers fall dormant, none dies."""
    depth, _ = depths(names)
    width = torch.full((len(names),), float(WIDTH), dtype=torch.float64)
    rank = width * (0.55 - 0.35 * depth * (0.4 + share)) + noise(width.shape, generator, 0.3)
    dormant = (0.25 * share * depth + noise(width.shape, generator, 0.02)).clamp(0, 1)
    return {
        "dormant": torch.stack([dormant, (dormant - 0.12).clamp(min=0)], -1),
        "dead": torch.zeros_like(width),
        "effective_rank": rank * 0.8,
        "effective_rank_centred": rank,
        "width": width,
    }


def training_curve(batches=49, seed=0):
    """Return a training curve of the demo's shape."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(1, batches + 1) * 320
    share = step / step.max()
    returns = 60 + 8000 * torch.sigmoid(12 * (share - 0.7)) * (1 + 0.15 * torch.randn(batches, generator=generator))
    returns[1] = torch.nan
    seconds = step / 160.0
    return pd.DataFrame(
        {
            "frames": (step * 1024 // 320).numpy(),
            "step": step.numpy(),
            "return": returns.numpy(),
            "episodes": 5,
            "seconds": seconds.numpy(),
            "observer_seconds": (0.6 + 0.03 * seconds).numpy(),
        }
    )


EVIL = [
    "<script>window.evil = 1</script>",
    "</style></script><img src=x onerror='window.evil=1'>",
    "\"'`${window.evil=1}`",
    "%{customdata[0]} <b>bold</b> &amp; $\\frac{1}{2}$",
    "naïve 層 🙂 \u202eright to left\u202c \u2028",
    "a very long name " * 18,
]


def fill_with(buffer, names, steps=(0, 1, 10)):
    """Append rows of every kind whose layers, targets, features, artifacts' marks and reasons have such names."""
    generator = torch.Generator().manual_seed(0)
    both = ("layer", "target")
    score = dict.fromkeys(("r2", "r2_null", "r2_initial", "r2_observation"), both)
    coords = {"layer": names, "target": names}
    legend = {"reason": {0: "scored", 1: names[0]}}
    buffer.declare("probe", dims={**score, "reason": both}, coords=coords, legend=legend, settings={names[0]: names[1]})
    buffer.declare(
        "ig", dims={("attr", "x"): ("batch", "target", "feature")}, coords={"target": names, "feature": names}
    )
    buffer.declare("health", dims={"dead": ("layer",), "cka_initial": ("layer",)}, coords={"layer": names})
    dims = {"cka_layers": ("layer", "other")}
    buffer.declare("alike", dims=dims, coords={"layer": names, "other": names})
    size = len(names)
    for step in steps:
        values = {key: torch.rand((size, size), generator=generator) for key in score}
        reason = torch.ones((size, size), dtype=torch.int8)
        buffer.append("probe", {**values, "reason": reason}, step=step)
        buffer.append("ig", {("attr", "x"): torch.randn((3, size, size), generator=generator)}, step=step)
        shares = {key: torch.rand(size, generator=generator) for key in ("dead", "cka_initial")}
        buffer.append("health", shares, step=step)
        buffer.append("alike", {"cka_layers": torch.rand((size, size), generator=generator)}, step=step)
    for name in names:
        buffer.note("mark", step=5, label=name)
        buffer.note("error", step=5, row=name, error=name)
