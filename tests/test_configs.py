"""Every YAML under configs/ instantiates, with a tiny random backbone in place of the one it names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from ullme.data.datamodule import TriplesDataModule
from ullme.losses import active
from ullme.trainer.cli import CONFIGS, ULLMECLI, ULLMEModule, find_config

NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def test_all_are_here():
    expected = {"quickstart.yaml", "msmarco_small.yaml", "grl_llama3.yaml", "grl_mistral.yaml", "grl_phi.yaml"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_instantiates(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            f"--config={find_config(name)}",
            f"--model.model_name_or_path={tiny_folder}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            f"--trainer.default_root_dir={tmp_path}",
        ],
    )
    cli = ULLMECLI(ULLMEModule, TriplesDataModule, run=False, save_config_callback=None)
    cli.model.configure_model()
    assert cli.model.model.name_or_path == tiny_folder
    assert cli.trainer.default_root_dir == str(tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("grl_")])
def test_grl_configs_hold_the_papers_settings(name):
    """Section 4 and appendix A."""
    config = yaml.safe_load(Path(find_config(name)).read_text())
    model, data = config["model"], config["data"]
    assert (model["lora_r"], model["lora_alpha"], model["lora_dropout"]) == (16, 32, 0.2)
    weights = {key: value["weight"] for key, value in model["losses"].items()}
    assert weights == {"contrastive": 1.0, "dpo": 0.5, "kl": 1.0}
    assert model["losses"]["dpo"]["beta"] == 0.1
    assert model["learning_rate"] == 2e-4
    assert (data["batch_size"], data["negatives"], config["trainer"]["max_steps"]) == (512, 8, 545)
    assert model["gradient_checkpointing"] is True
    assert model["pooling"] == "mean"


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_config_says_how_to_launch_it(name):
    head = Path(find_config(name)).read_text().split("\nseed_everything")[0]
    assert f"python train.py fit --config {name}" in head


def test_losses_of_the_quickstart_are_grl(monkeypatch, tiny_folder):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", find_config("quickstart.yaml")])
    cli = ULLMECLI(ULLMEModule, TriplesDataModule, run=False, save_config_callback=None)
    assert [name for name, _ in active(cli.model.losses)] == ["contrastive", "dpo", "kl"]
