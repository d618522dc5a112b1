"""One exact gradient of the joint objective in bounded memory (GradCache, Gao et al. 2021, extended to generation).

    1  plan     texts -> chunks under a token budget, sorted by length
    2  embed    each chunk without grad, its RNG state kept          -> R = reps [B, 1 + N, D], a leaf
    3  score    chunks of whole queries with grad                    -> logps, ref_logps [b, N]
                losses of one query (SFT, DPO, KL), times 1/B, backward now: parameters get the generation part, R.grad
                the part of KL
    4  contrast all-gather R over the ranks, losses over the batch (CL) of this rank's queries, backward into R.grad
    5  replay   each chunk of 2 with grad under its RNG state, backward of <reps, R.grad>
    6  average  the gradients over the ranks, once

With ``replay=False`` the graphs of 2 are kept and 5 runs no forward: faster by one forward, in memory that grows with
the batch.

Invariant: the gradient is that of the whole objective on the whole batch, for every sum of losses, every token budget,
for every number of ranks, with dropout. Only what some active loss reads is computed.

Shapes: B queries, N = 1 + negatives candidates (cell [i, 0] the positive), D width; axis 1 + N begins with the query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ullme.data.collate import Batch
from ullme.losses import Losses, LossInputs, active, candidate_mask
from ullme.losses.base import Loss
from ullme.models.likelihood import row_lengths
from ullme.models.ullme import ULLME
from ullme.ragged import Ragged, plan_chunks

from .ranks import Ranks
from .rng import RNGState


class NonFiniteLoss(FloatingPointError):
    """A term of the objective became NaN or infinite."""


@dataclass
class StepResult:
    """losses: weighted sum under "loss" and each unweighted term by its name; metrics: what else is logged. Scalars."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class GradCacheStep:
    """Accumulates the gradient of ``losses`` on a batch into the parameters of ``model``.

    token_budget: padded tokens of one forward pass; memory grows with it, numbers do not change.
    replay: embed twice rather than hold every chunk's activations; numbers do not change.
    backward: called with a scalar to differentiate; Lightning's ``manual_backward`` goes here.
    ranks: the processes that share the batch, B queries on each.
    """

    def __init__(
        self,
        model: ULLME,
        losses: Losses,
        token_budget: int = 8192,
        replay: bool = True,
        backward: Callable[[Tensor], None] = Tensor.backward,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.model, self.token_budget, self.replay, self.backward = model, token_budget, replay, backward
        self.over_batch = {name: loss for name, loss in active(losses) if loss.over_batch}
        self.over_query = {name: loss for name, loss in active(losses) if not loss.over_batch}
        self.reads = losses.reads
        if "ref_logps" in self.reads:
            with model.reference():  # refuse at once where there is no adapter to switch off
                pass

    def __call__(self, batch: Batch) -> StepResult:
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        embeds = "query_reps" in self.reads
        reps = None
        if embeds:
            texts, skip = embedding_rows(batch)
            chunks = plan_chunks(texts.lengths.flatten(), self.token_budget)
            reps, kept = self._embed(texts, skip, chunks)
        if self.over_query:
            terms |= self._score(batch, reps)
        if self.over_batch:
            assert reps is not None
            contrast, metrics = self._contrast(batch, reps)
            terms |= contrast
        if embeds:
            assert reps is not None
            self._backpropagate(texts, skip, chunks, kept, reps)
        self.ranks.mean_gradients(p for p in self.model.parameters() if p.requires_grad)
        terms = self.ranks.mean(terms)
        check_finite(terms)
        weights = {name: loss.weight for name, loss in (self.over_query | self.over_batch).items()}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return StepResult({"loss": total, **terms}, self.ranks.mean(metrics))

    def _embed(self, texts: Ragged, skip: Tensor, chunks: list[Tensor]) -> tuple[Tensor, list[RNGState | Tensor]]:
        """Reps [B, 1 + N, D] as a leaf that collects gradients; of each chunk its RNG state, or its reps with graph."""
        device = self.model.device
        reps = torch.zeros(skip.numel(), self.model.dim, device=device)
        kept: list[RNGState | Tensor] = []
        with torch.set_grad_enabled(not self.replay):
            for chunk in chunks:
                state = RNGState.of(device)
                chunk_reps = self.model.embed_rows(texts, chunk, skip)
                reps[chunk.to(device)] = chunk_reps.detach()
                kept.append(state if self.replay else chunk_reps)
        torch.clear_autocast_cache()  # it holds casts of the weights that were made without grad
        return reps.reshape(*texts.shape, -1).requires_grad_(), kept

    def _score(self, batch: Batch, reps: Tensor | None) -> dict[str, Tensor]:
        """Losses of single queries: values, with their gradients already in the parameters and in reps.grad."""
        model, device = self.model, self.model.device
        size = len(batch)
        totals = {name: torch.zeros((), device=device) for name in self.over_query}
        cost = row_lengths(batch.prompts.lengths, batch.targets.lengths, model.shared_rows)
        for queries in plan_chunks(cost, self.token_budget):
            ref_logps = None
            if "ref_logps" in self.reads:
                with torch.no_grad(), RNGState.kept(device), model.reference():
                    ref_logps = model.score(batch.prompts, batch.targets, queries)
            logps = model.score(batch.prompts, batch.targets, queries)
            rows = queries.to(device)
            inputs = LossInputs(
                mask=batch.mask[queries].to(device),
                query_reps=None if reps is None else reps[rows, 0],
                passage_reps=None if reps is None else reps[rows, 1:],
                logps=logps,
                ref_logps=ref_logps,
                lengths=batch.targets.lengths[queries].to(device),
            )
            self._differentiate(self.over_query, inputs, size, totals)
        return totals

    def _contrast(self, batch: Batch, reps: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses over the batch, and how well the batch is told apart already."""
        device = reps.device
        everyone = self.ranks.gather
        passage_hash = everyone(batch.passage_hash.to(device))
        positives = self.ranks.rank * len(batch) + torch.arange(len(batch), device=device)
        candidates = candidate_mask(
            batch.query_hash.to(device),
            batch.positive_hash.to(device),
            everyone(batch.query_hash.to(device)),
            passage_hash,
            positives,
            batch.in_batch_negatives.to(device),
        )
        inputs = LossInputs(
            mask=batch.mask.to(device),
            query_reps=reps[:, 0],
            passage_reps=everyone(reps[:, 1:]),
            candidates=candidates,
            positives=positives,
        )
        totals = {name: torch.zeros((), device=device) for name in self.over_batch}
        self._differentiate(self.over_batch, inputs, len(batch), totals)
        present = (passage_hash != 0)[None].expand_as(candidates)
        metrics = {"false_negatives_masked": (present & ~candidates).sum() / present.sum()}
        metrics |= ranking_metrics(reps.detach(), batch.mask.to(device))
        return totals, metrics

    def _differentiate(self, losses: dict[str, Loss], inputs: LossInputs, size: int, totals: dict[str, Tensor]) -> None:
        """Backward of the weighted losses of these queries as their share of a batch of ``size``; adds to totals."""
        with torch.autocast(self.model.device.type, enabled=False):
            values = {name: loss(inputs).sum() / size for name, loss in losses.items()}
            self.backward(torch.stack([losses[name].weight * value for name, value in values.items()]).sum())
        for name, value in values.items():
            totals[name] += value.detach()

    def _backpropagate(
        self, texts: Ragged, skip: Tensor, chunks: list[Tensor], kept: list[RNGState | Tensor], reps: Tensor
    ) -> None:
        """What the reps collected goes on into the parameters, chunk by chunk."""
        if reps.grad is None:
            return
        grads = reps.grad.flatten(0, 1)
        for chunk, held in zip(chunks, kept, strict=True):
            grad = grads[chunk.to(grads.device)]
            if isinstance(held, Tensor):
                self.backward((held * grad).sum())
            else:
                with held.replayed():
                    self.backward((self.model.embed_rows(texts, chunk, skip) * grad).sum())


def embedding_rows(batch: Batch) -> tuple[Ragged, Tensor]:
    """The texts to embed as cells [B, 1 + N], each query in front of its passages, and their skips, flat int64."""
    pieces_q = batch.queries.tokens.split(batch.queries.lengths.tolist())
    pieces_p = batch.passages.tokens.split(batch.passages.lengths.sum(-1).tolist())
    tokens = torch.cat([piece for pair in zip(pieces_q, pieces_p, strict=True) for piece in pair])
    lengths = torch.cat([batch.queries.lengths[:, None], batch.passages.lengths], dim=1)
    skip = torch.cat([batch.query_skip[:, None], batch.passage_skip], dim=1)
    return Ragged(tokens, lengths), skip.flatten()


@torch.no_grad()
def ranking_metrics(reps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Where the positive stands among its own candidates: reps [B, 1 + N, D], mask bool [B, N]."""
    reps = torch.nn.functional.normalize(reps, dim=-1)
    scores = (reps[:, :1] * reps[:, 1:]).sum(-1)
    rank = 1 + (mask[:, 1:] & (scores[:, 1:] > scores[:, :1])).sum(-1)
    return {"positive_rank": rank.float().mean(), "positive_first": (rank == 1).float().mean()}


def check_finite(terms: dict[str, Tensor]) -> None:
    """Raise NonFiniteLoss naming the terms that are NaN or infinite."""
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    bad = {name: value for name, value in values.items() if not torch.isfinite(torch.tensor(value))}
    if bad:
        named = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteLoss(f"{named}: lower model.learning_rate or model.max_grad_norm, or look at this batch's texts")
