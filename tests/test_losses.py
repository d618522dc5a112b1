"""Each loss equals its closed form; masked cells change nothing; duplicates are never negatives; errors name shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from ullme.losses import (
    DPOLoss,
    KLLoss,
    Losses,
    LossInputs,
    NTXentLoss,
    SFTLoss,
    active,
    candidate_mask,
    cosine_scores,
    dpo,
    kl_alignment,
    ntxent,
    sft,
)


def contrast(scores: list, tau: float, candidates: list | None = None, **kwargs: float) -> torch.Tensor:
    scores = torch.tensor(scores)
    mask = torch.ones_like(scores, dtype=torch.bool) if candidates is None else torch.tensor(candidates)
    return ntxent(scores, torch.arange(len(scores)), mask, tau, **kwargs)


def test_ntxent_closed_form():
    # query 0: positive 0.8, own negative 0.2, the other query's passages 0.5 and 0.1
    scores = [[[0.8, 0.2], [0.5, 0.1]], [[0.0, 0.3], [0.6, -0.4]]]
    expected = [
        -math.log(math.exp(8) / (math.exp(8) + math.exp(2) + math.exp(5) + math.exp(1))),
        -math.log(math.exp(6) / (math.exp(0) + math.exp(3) + math.exp(6) + math.exp(-4))),
    ]
    torch.testing.assert_close(contrast(scores, 0.1), torch.tensor(expected))


def test_ntxent_is_cross_entropy_over_all_passages():
    queries, passages = torch.randn(5, 16), torch.randn(5, 3, 16)
    scores = cosine_scores(queries, passages)
    expected = torch.nn.functional.cross_entropy(scores.flatten(1) / 0.05, torch.arange(5) * 3, reduction="none")
    got = ntxent(scores, torch.arange(5), torch.ones_like(scores, dtype=torch.bool), 0.05)
    torch.testing.assert_close(got, expected)


def test_masked_candidates_carry_no_gradient():
    scores = torch.tensor([[[0.8, 0.2, 0.7]]], requires_grad=True)
    ntxent(scores, torch.tensor([0]), torch.tensor([[[True, True, False]]]), 0.1).sum().backward()
    assert scores.grad[0, 0, 2] == 0
    assert scores.grad[0, 0, 1] > 0


def test_margin_leaves_out_what_scores_above_the_positive():
    scores = [[[0.5, 0.6, 0.4], [0.56, 0.1, 0.55]]]
    kept = [[[True, False, True], [False, True, True]]]
    torch.testing.assert_close(contrast(scores, 0.1, margin=0.05), contrast(scores, 0.1, kept))


def test_own_negatives_only():
    reps, passages = torch.randn(3, 8), torch.randn(3, 2, 8)
    inputs = LossInputs(
        mask=torch.ones(3, 2, dtype=torch.bool),
        query_reps=reps,
        passage_reps=passages,
        candidates=torch.ones(3, 3, 2, dtype=torch.bool),
        positives=torch.arange(3),
    )
    scores = torch.stack([torch.cosine_similarity(reps[i], passages[i]) for i in range(3)])
    expected = torch.nn.functional.cross_entropy(scores / 0.05, torch.zeros(3, dtype=torch.long), reduction="none")
    torch.testing.assert_close(NTXentLoss(in_batch_negatives=False)(inputs), expected)


def test_duplicates_of_a_positive_are_never_negatives():
    query_hash = torch.tensor([1, 2, 1])  # queries 0 and 2 are the same question
    passage_hash = torch.tensor([[10, 11, 0], [20, 10, 12], [30, 20, 13]])
    positive_hash = torch.tensor([[10, 12], [20, 0], [30, 0]])  # row 0 has a second positive, not in its cells
    mask = candidate_mask(query_hash, positive_hash, query_hash, passage_hash, torch.arange(3))
    assert mask[0].tolist() == [[True, True, False], [True, False, False], [False, True, True]]
    assert mask[1].tolist() == [[True, True, False], [True, True, True], [True, False, True]]
    assert mask[2].tolist() == [[False, True, False], [True, True, True], [True, True, True]]


def test_rows_without_in_batch_negatives_see_only_their_own():
    hashes = torch.tensor([[10, 11], [20, 21]])
    mask = candidate_mask(
        torch.tensor([1, 2]), hashes[:, :1], torch.tensor([1, 2]), hashes, torch.arange(2), torch.tensor([True, False])
    )
    assert mask[0].all()
    assert mask[1].tolist() == [[False, False], [True, True]]


def test_sft_is_the_mean_over_passage_tokens():
    logps = torch.tensor([[-12.0, -99.0], [-6.0, -1.0]])
    lengths = torch.tensor([[4, 1], [2, 1]])
    torch.testing.assert_close(sft(logps, lengths, torch.ones(2, 2, dtype=torch.bool)), torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("loss", ["sft", "kl"])
def test_a_passage_without_tokens_is_an_error(loss):
    logps, lengths, mask = torch.zeros(1, 2), torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=torch.bool)
    inputs = LossInputs(mask, torch.ones(1, 4), torch.ones(1, 2, 4), logps=logps, lengths=lengths)
    with pytest.raises(ValueError, match="response mask is empty"):
        (SFTLoss() if loss == "sft" else KLLoss())(inputs)


def test_dpo_closed_form():
    logps = torch.tensor([[-10.0, -12.0, -30.0]])
    ref = torch.tensor([[-11.0, -11.0, -20.0]])
    mask = torch.tensor([[True, True, True]])
    margins = [0.1 * (1 - (-1)), 0.1 * (1 - (-10))]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 2
    torch.testing.assert_close(dpo(logps, ref, mask, 0.1), torch.tensor([expected]))
    only_first = math.log1p(math.exp(-margins[0]))
    torch.testing.assert_close(dpo(logps, ref, torch.tensor([[True, True, False]]), 0.1), torch.tensor([only_first]))


def test_dpo_of_the_reference_itself_is_log_two():
    logps = torch.randn(4, 3) * 50
    value = dpo(logps, logps.clone(), torch.ones(4, 3, dtype=torch.bool), 0.1)
    torch.testing.assert_close(value, torch.full((4,), math.log(2)))


def test_kl_direction_and_temperatures():
    rt, gen = torch.randn(6, 5), torch.randn(6, 5)
    expected = kl_divergence(Categorical(logits=rt / 0.5), Categorical(logits=gen / 2.0))
    torch.testing.assert_close(kl_alignment(rt, gen, torch.ones(6, 5, dtype=torch.bool), 0.5, 2.0), expected)


def test_kl_ignores_missing_candidates():
    rt, gen = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[True, True, True, False]] * 2)
    full = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(kl_alignment(rt, gen, mask), kl_alignment(rt[:, :3], gen[:, :3], full))


@pytest.mark.parametrize(("stop", "moves_reps", "moves_logps"), [("none", 1, 1), ("rt", 0, 1), ("gen", 1, 0)])
def test_kl_gradient_flows_where_it_is_let(stop, moves_reps, moves_logps):
    queries, passages = torch.randn(2, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    logps = (torch.randn(2, 3) * 10).requires_grad_()
    inputs = LossInputs(
        torch.tensor([[True, True, True], [True, True, False]]),
        queries,
        passages,
        logps=logps,
        lengths=torch.full((2, 3), 4),
    )
    KLLoss(stop_gradient=stop)(inputs).sum().backward()
    assert (queries.grad is not None and bool(queries.grad.abs().sum() > 0)) == bool(moves_reps)
    assert (logps.grad is not None and bool(logps.grad.abs().sum() > 0)) == bool(moves_logps)
    for tensor in (queries, passages, logps):
        assert tensor.grad is None or bool(tensor.grad.isfinite().all())


def test_listing_2_names():
    losses = Losses.from_names("NTXentLoss", "dpo", True)
    assert {name: loss.weight for name, loss in active(losses)} == {"contrastive": 1.0, "dpo": 0.5, "kl": 1.0}
    assert "ref_logps" not in Losses.from_names("NTXentLoss", "sft", True).reads
    assert "logps" not in Losses.from_names("NTXentLoss", None, False).reads


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Losses.from_names("TripletLoss", "dpo", True), "unknown con_loss_type 'TripletLoss'"),
        (lambda: Losses.from_names("NTXentLoss", "ppo", True), "unknown gen_loss_type 'ppo'.*'sft', 'dpo'"),
        (lambda: Losses(contrastive=None), "holds no term"),
        (lambda: NTXentLoss(temperature=0.0), "temperature must be positive"),
        (lambda: DPOLoss(weight=0.0), "weight must be positive"),
        (lambda: cosine_scores(torch.ones(2, 3), torch.ones(2, 4)), r"\[2, 3\] and \[2, 4\]"),
        (lambda: dpo(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool), 0.1), "data.negatives"),
    ],
)
def test_errors_say_what_was_got(make, message):
    with pytest.raises(ValueError, match=message):
        make()
