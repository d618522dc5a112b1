"""The wheel holds every subpackage and the built-in model; importing needs no network, no GPU and nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_contains_every_module_and_the_model(tmp_path):
    sources = tmp_path / "sources"  # setuptools leaves a build folder that would hide what a later wheel lacks
    shutil.copytree(ROOT / "ullme", sources / "ullme")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ullme-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ullme").rglob("*.py")}
    assert modules <= names
    assert {f"ullme/assets/docs-lm/{name}" for name in ("model.safetensors", "tokenizer.json", "README.md")} <= names


def test_import_is_light_and_needs_no_network():
    """Sockets raise; the top-level packages bring in neither mteb nor Lightning nor a model."""
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network at import")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import ullme, ullme.data, ullme.eval, ullme.losses, ullme.models, ullme.trainer
heavy = {"mteb", "lightning", "transformers", "sentence_transformers", "datasets", "wandb"} & set(sys.modules)
assert not heavy, heavy
from ullme.models import ULLME
assert "mteb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
