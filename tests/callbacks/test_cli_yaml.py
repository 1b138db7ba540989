"""A YAML file sets up each callback, nested settings included."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from small import Net, loader

from tdhook_train import ArtifactBuffer

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")

CONFIG = """
    seed_everything: 0
    trainer:
      max_epochs: 1
      accelerator: cpu
      logger: false
      enable_checkpointing: false
      enable_progress_bar: false
      enable_model_summary: false
      callbacks:
        - class_path: tdhook_train.callbacks.ProbeCallback
          init_args:
            layers: net.*
            target: target
            every_n_train_steps: 3
            dirpath: {folder}/probe
        - class_path: tdhook_train.callbacks.AttributionCallback
          init_args:
            method:
              class_path: tdhook_train.attribution.IntegratedGradients
              init_args:
                points: 4
                rows: 5
            when:
              class_path: tdhook_train.Every
              init_args:
                batches: 3
            dirpath: {folder}/attribution
        - class_path: tdhook_train.callbacks.PatchingCallback
          init_args:
            layers: [net.0, net.4]
            pairs: 4
            every_n_epochs: 1
            dirpath: {folder}/patching
        - class_path: tdhook_train.callbacks.HealthCallback
          init_args:
            taus: [0.0, 0.5]
            every_n_train_steps: 3
            on_error: warn
            dirpath: {folder}/health
        - class_path: tdhook_train.callbacks.ActivationCallback
          init_args:
            layers: head
            keep: 3
            every_n_train_steps: 3
            dirpath: {folder}/activations
        - class_path: tdhook_train.callbacks.EditCallback
          init_args:
            edit:
              class_path: tdhook_train.latent.Ablate
              init_args:
                layers: net.2
                units: 1
            when:
              class_path: tdhook_train.Every
              init_args:
                optim_steps: 2
            steps: 1
            dirpath: {folder}/edit
        - class_path: tdhook_train.callbacks.ObserverCallback
          init_args:
            methods:
              rank:
                class_path: tdhook_train.health.EffectiveRank
                init_args:
                  layers: net.*
            train_time_interval: "1:00:00"
            dirpath: {folder}/observer
"""


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


def test_a_yaml_file_sets_up_every_callback(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(textwrap.dedent(CONFIG).format(folder=tmp_path))
    LightningCLI(Net, Data, args=["fit", "--config", str(config)], save_config_callback=None)
    steps = {}
    for entry in yaml.safe_load(config.read_text())["trainer"]["callbacks"]:
        path = entry["init_args"]["dirpath"]
        with ArtifactBuffer.open(path) as buffer:
            steps |= {f"{path.rpartition('/')[2]}/{name}": buffer[name].steps.tolist() for name in buffer}
    assert steps == {
        "probe/probe": [0, 3, 6],
        "attribution/attribution": [3, 6],
        "patching/patching": [0, 6],
        "health/health": [0, 3, 6],
        "activations/activations": [0, 3, 6],
        "edit/edit": [2, 3, 4, 5, 6, 6],  # begun after the last step, and ended with the fit
        "observer/rank": [0, 6],
    }
    with ArtifactBuffer.open(tmp_path / "health") as buffer:
        assert buffer["health"].coords["tau"] == [0.0, 0.5]
    with ArtifactBuffer.open(tmp_path / "attribution") as buffer:
        assert buffer["attribution"][0]["attr", "input"].shape[0] == 5
