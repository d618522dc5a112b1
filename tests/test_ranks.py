"""The number of ranks changes no loss, no gradient and no trained weight: 2 real processes (gloo) against one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_gradcache import SYSTEMS, batch_of, gradients, make, relative_error, triples

from ullme.data.collate import Collator
from ullme.data.triples import Triple
from ullme.trainer.gradcache import GradCacheStep
from ullme.trainer.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]


def rows() -> list[Triple]:
    """Six queries: three a rank; the last repeats the positive of the first, which is then no negative of it."""
    first = triples()
    return [*first, Triple("another question", first[0].positive, ["nobody"], [first[0].positive], "", True)]


def one_rank(rank: int, folder: str, system: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = make(folder)
    batch = Collator(model.texts, negatives=3)(rows()[3 * rank : 3 * rank + 3])
    budget = (10**9, 60)[rank]  # unequal numbers of chunks
    result = GradCacheStep(model, SYSTEMS[system], budget, ranks=Ranks(rank, 2))(batch)
    torch.save({"losses": result.losses, "gradients": gradients(model)}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("system", ["CL", "CL+SFT", "CL+DPO+KL", "DPO"])
def test_two_ranks_are_one(tiny_folder, tmp_path, system):
    mp.spawn(one_rank, (tiny_folder, system, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = make(tiny_folder)
    expected = GradCacheStep(model, SYSTEMS[system])(Collator(model.texts, negatives=3)(rows()))
    expected_gradients = gradients(model)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["losses"], expected.losses, rtol=1e-5, atol=1e-6)
        assert relative_error(got["gradients"], expected_gradients) < 1e-5


def test_alone_every_message_is_the_identity(tiny_folder):
    tensor = torch.randn(3, 2, requires_grad=True)
    assert Ranks().gather(tensor) is tensor
    model = make(tiny_folder)
    GradCacheStep(model, SYSTEMS["CL"])(batch_of(model))
    before = {name: p.grad for name, p in model.named_parameters()}
    Ranks().mean_gradients(model.parameters())
    assert all(p.grad is before[name] for name, p in model.named_parameters())


def test_ddp_through_the_command_line_trains_the_weights_of_one_process(tiny_folder, tmp_path):
    lines = [
        {"query": row.query, "pos": [row.positive], "neg": row.negatives} for row in [*rows(), *rows()] for _ in (0, 1)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = []
    for devices in (1, 2):
        command = [sys.executable, str(ROOT / "train.py"), "fit", f"--model.model_name_or_path={tiny_folder}"]
        command += ["--model.lora_r=4", "--model.losses.dpo.weight=0.5", "--model.losses.kl.weight=1.0"]
        command += ["--data.train=train.jsonl", "--data.batch_size=4", "--data.negatives=2", "--data.num_workers=0"]
        command += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.devices={devices}"]
        command += [f"--trainer.strategy={'ddp' if devices > 1 else 'auto'}", f"--trainer.default_root_dir={devices}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        (checkpoint,) = (tmp_path / str(devices)).rglob("*.ckpt")
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
