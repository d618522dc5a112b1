"""Shared rows score as separate rows do; sliced log-likelihood is the full log-softmax, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from ullme.models import ULLME
from ullme.models.backbones import LMHead
from ullme.models.likelihood import lay_out, row_lengths, token_logps
from ullme.ragged import Ragged


def cells(n_queries: int, n_candidates: int, missing: set[tuple[int, int]] = frozenset()) -> tuple[Ragged, Ragged]:
    generator = torch.Generator().manual_seed(3)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(5, 300, (length,), generator=generator).tolist()

    prompts = Ragged.from_lists([some(1, 9) for _ in range(n_queries)])
    rows = [[] if (i, j) in missing else some(1, 20 + 5 * j) for i in range(n_queries) for j in range(n_candidates)]
    return prompts, Ragged.from_lists(rows, (n_queries, n_candidates))


@torch.no_grad()
def by_hand(model: ULLME, prompts: Ragged, targets: Ragged) -> torch.Tensor:
    """One plain Hugging Face forward a candidate, full log-softmax."""
    total = torch.zeros(targets.shape)
    for i in range(targets.shape[0]):
        for j in range(targets.shape[1]):
            passage = targets[i, j]
            if len(passage):
                ids = torch.cat([prompts[i], passage])[None]
                logits = model(ids, torch.ones_like(ids), is_generate=True).logits[0]
                logps = logits.float().log_softmax(-1)[len(prompts[i]) - 1 : -1]
                total[i, j] = logps.gather(-1, passage[:, None]).sum()
    return total


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_equal_one_plain_forward_a_candidate(backbone_folder, family, shared):
    extra = {"final_logit_softcapping": 3.0, "sliding_window": 6, "head_dim": 8} if family == "gemma2" else {}
    model = ULLME(backbone_folder(family, **extra)).eval()
    prompts, targets = cells(4, 3, missing={(1, 2), (3, 1)})
    head, decided = model._score_setup()
    assert decided, f"{family} reads a query's candidates in one row"
    model._scorer = head, shared
    with torch.no_grad():
        scores = model.score(prompts, targets)
    torch.testing.assert_close(scores, by_hand(model, prompts, targets), atol=1e-3, rtol=1e-5)
    assert scores[1, 2] == 0
    with torch.no_grad():
        torch.testing.assert_close(model.score(prompts, targets, torch.tensor([2, 0])), scores[[2, 0]])


def test_a_query_is_read_once():
    prompts, targets = cells(3, 4)
    layout = lay_out(prompts, targets, torch.arange(3), shared=True, pad_id=0)
    read = int((layout.segments >= 0).sum())
    assert read == int(prompts.lengths.sum() + targets.lengths.sum()) - targets.lengths.numel()
    assert layout.input_ids.shape[1] == int(row_lengths(prompts.lengths, targets.lengths, True).max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sliced_equals_full_log_softmax(fused, with_bias, softcap, monkeypatch):
    if not fused:
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)  # as before PyTorch 2.13
    monkeypatch.setattr("ullme.models.likelihood.SLICE_ELEMENTS", 300 * 7)
    module = torch.nn.Linear(16, 300, bias=with_bias)
    head = LMHead(module, softcap=softcap)
    states, targets = torch.randn(40, 16, requires_grad=True), torch.randint(300, (40,))
    weights = torch.randn(40)
    (token_logps(states, targets, head) * weights).sum().backward()
    got = [states.grad.clone(), module.weight.grad.clone()]
    states.grad = module.weight.grad = None
    full = head.logits(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_logps(states, targets, head), full)
    (full * weights).sum().backward()
    torch.testing.assert_close(got, [states.grad, module.weight.grad], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_full_logits_are_never_held(softcap):
    """Every intermediate of the forward pass that autograd keeps is far smaller than [T, V]."""
    tokens, vocabulary = 4000, 20000
    module = torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    states = torch.randn(tokens, 8, requires_grad=True)
    largest = 0

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        token_logps(states, torch.randint(vocabulary, (tokens,)), LMHead(module, softcap=softcap)).sum().backward()
    assert largest < tokens * vocabulary / 4


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="a prompt has no token"):
        lay_out(Ragged.from_lists([[]]), Ragged.from_lists([[1, 2]], (1, 1)), torch.arange(1), True, 0)
