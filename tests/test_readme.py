"""What the README shows runs: its Python as it stands, its commands as far as parsing them, its links."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from ullme.eval.cli import parser
from ullme.trainer.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=["embed", "train"])
def test_python(code, tmp_path, monkeypatch):
    rows = [{"query": f"what is {w}", "pos": [f"{w} is a word"], "neg": ["nothing", "a fox"]} for w in "abcdefgh"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", re.findall(r"^    python (.*)$", README, flags=re.MULTILINE))
def test_commands_parse(line, monkeypatch, capsys):
    script, *arguments = shlex.split(line, comments=True)
    assert (ROOT / script).is_file()
    if script == "evaluate.py":
        assert parser().parse_args(arguments).model
        return
    arguments = [argument for argument in arguments if argument != "--print_config"]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "losses:" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / link).exists(), link
