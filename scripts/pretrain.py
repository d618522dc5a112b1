r"""Pretrain the small language model that the repository ships (``ullme/assets/docs-lm``).

    loss = -mean_i log pi(w_i | w_<i)        over packed documents  <bos> document <eos>

The text is the docstrings of the installed packages, the held-out ones excepted. Half of the documents that have a
summary and a body are written as the generation prompt that fine-tuning conditions on, the others as they stand:

    Query: {summary}\nPassage:\n {body}            {summary}\n {body}

Prompt and body are tokenised apart and joined as ids, exactly as the likelihood of a passage is scored later.

    python scripts/pretrain.py --minutes 60                    # resumes from --work when it was interrupted
    python scripts/pretrain.py --minutes 60 --export-only      # exports the last checkpoint
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import coo_array, csr_array
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ullme.data.docs import HELD_OUT, docs_pairs, docs_texts, fingerprint

BLOCK = 512  # tokens in a packed row
HELD_OUT_ROWS = 64  # rows on which perplexity is measured
LOG_EVERY = 20  # steps
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def train_tokenizer(texts: list[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased text: a word is one token whether it opens a sentence or not."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    bpe.train_from_iterator((f"{summary}\n{body}" for summary, body in texts), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=2 * BLOCK
    )


class Documents:
    """Token ids of every document, both ways of opening it; packed anew, in another order, for each epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]):
        def encode(strings: list[str]) -> list[np.ndarray]:
            rows = tokenizer.backend_tokenizer.encode_batch_fast(strings, add_special_tokens=False)
            return [np.asarray(row.ids, dtype=np.int32) for row in rows]

        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bodies = encode([body for _, body in texts])
        self.prompted = encode([f"Query: {s}\nPassage:\n" if s and b else s for s, b in texts])
        self.bare = encode([f"{s}\n" if s and b else s for s, b in texts])

    def blocks(self, seed: int) -> np.ndarray:
        """int32 [n, BLOCK]."""
        rng = np.random.default_rng(seed)
        pieces: list[np.ndarray] = []
        for i in rng.permutation(len(self.bodies)):
            opening = (self.prompted if rng.random() < 0.5 else self.bare)[i]
            pieces += [np.array([self.bos], np.int32), opening, self.bodies[i], np.array([self.eos], np.int32)]
        stream = np.concatenate(pieces)
        return stream[: len(stream) // BLOCK * BLOCK].reshape(-1, BLOCK)


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=round(width * 8 / 3 / 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=2 * BLOCK,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def word_vectors(blocks: np.ndarray, vocab_size: int, width: int, window: int = 8) -> Tensor:
    """The embedding to start from: a truncated SVD of the text's smoothed PPMI matrix (Levy et al. 2015).

    Counting takes seconds, and training starts from words that know their neighbours.
    blocks: [n, BLOCK]; returns float32 [vocab_size, width], rows centred, with the norm that a random start has.
    """
    torch.manual_seed(0)
    shape = (vocab_size, vocab_size)
    counts = csr_array(shape, dtype=np.float32)
    for offset in range(1, window + 1):
        left, right = blocks[:, :-offset].ravel(), blocks[:, offset:].ravel()
        counts += coo_array((np.full(left.size, 1 / offset, np.float32), (left, right)), shape=shape).tocsr()
    joint = torch.from_numpy((counts + counts.T).toarray())
    words = joint.sum(1, keepdim=True)
    contexts = joint.sum(0, keepdim=True) ** 0.75
    expected = words * contexts / contexts.sum()
    ppmi = torch.where(joint > 0, joint / expected.clamp(min=1e-9), 1).log().clamp(min=0)
    left_vectors, values, _ = torch.svd_lowrank(ppmi, q=width + 32, niter=2)
    vectors = left_vectors[:, :width] * values[:width].sqrt()
    vectors = nn.functional.normalize(vectors - vectors.mean(0))
    return vectors * 0.02 * width**0.5


def build_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon([{"params": matrices, "peak": lr}], lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": others, "peak": lr / 2}], betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=rows).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden).flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Per token, over int64 rows [n, BLOCK]."""
    return math.exp(sum(loss_of(model, chunk).item() * len(chunk) for chunk in rows.split(16)) / len(rows))


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    row: int = 0
    perplexity_before: float = float("nan")
    perplexity: float = float("nan")


def rate(done: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Warm-up, then cosine down to ``floor``; ``done`` is the share of the time budget used."""
    if done < warmup:
        return max(done, 1e-3) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time; the schedule follows it")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="checkpoints, to resume from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "ullme" / "assets" / "docs-lm")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {BLOCK} tokens per step")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--export-every", type=float, default=5, help="minutes between checkpoints (and exports)")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    parser.add_argument("--no-compile", action="store_true", help="slower, needs no C++ compiler")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    texts, tokenizer = prepare(args.work, args.vocab_size)
    model = build_model(tokenizer, args.width, args.layers)
    optimizers = build_optimizers(model, args.lr)
    state = Progress()
    checkpoint = args.work / "checkpoint"
    if checkpoint.exists():
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        for i, one in enumerate(optimizers):
            one.load_state_dict(torch.load(checkpoint / f"optimizer{i}.pt", weights_only=True))
        state = Progress(**json.loads((checkpoint / "progress.json").read_text()))
        print(f"resumed at step {state.step}, {state.seconds / 60:.1f} minutes", flush=True)
    if args.export_only:
        export(model, tokenizer, state, args)
        return

    train = Documents(tokenizer, texts["train"])
    blocks = train.blocks(seed=state.epoch)
    held_out = torch.from_numpy(Documents(tokenizer, texts["held_out"]).blocks(seed=0)[:HELD_OUT_ROWS]).long()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts['train'])} documents, {blocks.size:,} tokens an epoch; {parameters:,} parameters", flush=True)
    if state.step == 0:
        state.perplexity_before = perplexity(model, held_out)
        print(f"held-out perplexity of the random model {state.perplexity_before:.0f}", flush=True)
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(word_vectors(blocks, len(tokenizer), args.width))
    train_loss = loss_of if args.no_compile else torch.compile(loss_of)

    budget, saved, recent = 60 * args.minutes, state.seconds, []
    clock = logged = time.monotonic()
    while state.seconds < budget:
        if state.row + args.batch > len(blocks):
            state.epoch, state.row = state.epoch + 1, 0
            blocks = train.blocks(seed=state.epoch)
        rows = torch.from_numpy(blocks[state.row : state.row + args.batch]).long()
        loss = train_loss(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = group["peak"] * rate(state.seconds / budget)
            one.step()
            one.zero_grad()
        recent.append(loss.item())
        state.step, state.row, state.tokens = state.step + 1, state.row + args.batch, state.tokens + rows.numel()
        state.seconds, clock = state.seconds + time.monotonic() - clock, time.monotonic()
        if len(recent) == LOG_EVERY:
            speed, logged = LOG_EVERY * rows.numel() / (clock - logged), clock
            epochs, lr = state.epoch + state.row / len(blocks), optimizers[0].param_groups[0]["lr"]
            print(
                f"{state.seconds / 60:6.1f} min  step {state.step:5d}  epoch {epochs:.2f}  loss {np.mean(recent):.3f}"
                f"  lr {lr:.1e}  {speed:,.0f} tokens/s",
                flush=True,
            )
            recent.clear()
        if state.seconds - saved > 60 * args.export_every or state.seconds >= budget:
            saved = state.seconds
            state.perplexity = perplexity(model, held_out)
            print(f"{state.seconds / 60:6.1f} min  held-out perplexity {state.perplexity:.2f}", flush=True)
            save_checkpoint(checkpoint, model, optimizers, state)
            export(model, tokenizer, state, args)
    print(f"done: {args.out}", flush=True)


def prepare(work: Path, vocab_size: int) -> tuple[dict[str, list], PreTrainedTokenizerFast]:
    """The texts and the tokenizer, made once and kept in ``work``."""
    texts_file, tokenizer_folder = work / "texts.json", work / "tokenizer"
    if not texts_file.exists():
        held_out_packages = {name for names in HELD_OUT.values() for name in names}
        held_out = [(pair.query, pair.passage) for pair in docs_pairs() if pair.package in held_out_packages]
        texts_file.write_text(json.dumps({"train": docs_texts(), "held_out": held_out}))
    texts = json.loads(texts_file.read_text())
    if not tokenizer_folder.exists():
        train_tokenizer(texts["train"], vocab_size).save_pretrained(tokenizer_folder)
    return texts, PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def save_checkpoint(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: Progress) -> None:
    """Written aside, then renamed: an interrupted run always finds a whole checkpoint."""
    aside = folder.with_name("checkpoint.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file(dict(model.named_parameters()), aside / "model.safetensors")
    for i, one in enumerate(optimizers):
        torch.save(one.state_dict(), aside / f"optimizer{i}.pt")
    (aside / "progress.json").write_text(json.dumps(asdict(state)))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, state: Progress, args: argparse.Namespace
) -> None:
    """A plain transformers folder in bf16 with its model card, written aside and then put in place."""
    aside = args.out.with_name(f"{args.out.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    copy = build_model(tokenizer, args.width, args.layers)
    copy.load_state_dict(dict(model.named_parameters()), strict=False)
    copy.bfloat16().save_pretrained(aside)
    (aside / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(aside)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids, max_new_tokens=64, repetition_penalty=1.1).save_pretrained(aside)
    parameters = sum(p.numel() for p in model.parameters())
    (aside / "README.md").write_text(
        CARD.format(
            parameters=f"{parameters / 1e6:.1f}",
            layers=args.layers,
            width=args.width,
            vocabulary=len(tokenizer),
            tokens=f"{state.tokens / 1e6:.1f}",
            steps=state.step,
            minutes=f"{state.seconds / 60:.0f}",
            rows=args.batch,
            block=BLOCK,
            context=2 * BLOCK,
            lr=args.lr,
            before=f"{state.perplexity_before:.0f}",
            after=f"{state.perplexity:.1f}",
            held_out_tokens=f"{HELD_OUT_ROWS * BLOCK:,}",
            held_out=", ".join(sorted(name for names in HELD_OUT.values() for name in names)),
            fingerprint=fingerprint(),
            command=f"python scripts/pretrain.py --minutes {args.minutes:g} --lr {args.lr:g}",
        )
    )
    shutil.rmtree(args.out, ignore_errors=True)
    os.rename(aside, args.out)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# docs-lm

A language model small enough to ship with the source code: a Llama of {parameters} M parameters ({layers} layers of
width {width}, tied embeddings, context {context}) and a byte-level BPE of {vocabulary} tokens over lower-cased text.
It is the backbone of the quickstart, which fine-tunes it into an embedder that searches Python documentation. It
knows nothing else and is not meant to be talked to.

| | |
|---|---|
| text | docstrings of the Python packages of this project's environment (fingerprint `{fingerprint}`) |
| held out | every text of {held_out}, and any text with the same words as one of their summaries or bodies |
| form | half of the documents as `Query: summary`, `Passage:`, body (fine-tuning's prompt), the others plain |
| training | {tokens} M tokens in {steps} steps of {rows} x {block}; {minutes} minutes on two busy CPU cores, bf16 |
| optimiser | Muon for the layers' matrices (peak rate {lr:g}), AdamW for the rest; warm-up, cosine by elapsed time |
| start | random layers; embedding from a truncated SVD of the text's PPMI matrix |
| held-out perplexity per token | {before} before (random), **{after}** after; {held_out_tokens} tokens |
| made by | `{command}` |

Lower-casing makes a word one token wherever it stands, which a small vocabulary and a small budget need; so what the
model generates is lower-case too.

**Licence of the texts.** The docstrings belong to the authors of the packages, all of them open source (mostly BSD,
MIT and Apache-2.0). The weights contain no copy of them beyond what a model of this size memorises.
"""


if __name__ == "__main__":
    main()
