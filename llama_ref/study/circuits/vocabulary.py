"""A head's effect on tokens, by its weights alone: which token attends to which, and what it then copies.

A head that attends to a token adds W_OV times the token's normed embedding to the stream, and the output
matrix turns this into logits (the OV circuit); scores are q · k / √hd of two normed embeddings (the QK
circuit). In later layers the stream holds more than embeddings, and this is only the direct part. Source:
Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.circuits.head_matrices import HeadMatrices, check_distance, turned, vocabulary_rows
from llama_ref.study.inputs import check_index, check_token
from llama_ref.study.passes.hooks import check_model

ROWS = 1 << 13  # tokens of the vocabulary at a time


@dataclass(frozen=True)
class Copying:
    """Eigenvalues of every head's OV circuit from token to token: complex64 (n_layers, H, hd), on the CPU.

    The circuit's V × V matrix has rank hd at most, so all other eigenvalues are 0.
    """

    eigenvalues: Tensor

    @property
    def scores(self) -> Tensor:
        """Σλ / Σ|λ|, float32 (n_layers, H): 1 if a head only copies tokens, -1 if it only suppresses them."""
        return self.eigenvalues.sum(-1).real / self.eigenvalues.abs().sum(-1)


@torch.no_grad()
def copying(model: Transformer, *, fold_norms: bool = True, progress: Progress | None = None) -> Copying:
    """Eigenvalues of output · W_OV · embedding, for every head.

    They equal the eigenvalues of W_v·(embedding · output)·W_o, which is (hd, hd). The matrix in brackets,
    (D, D), is the same for all heads and computed once, in blocks of the vocabulary. `fold_norms` includes
    the weights of the norms before attention and output. `progress` is called with the layers done and
    their number.
    """
    check_model(model)
    through = _through_vocabulary(model, fold_norms=fold_norms)
    counter, found = ProgressCounter(model.args.n_layers, progress), []
    for layer in range(model.args.n_layers):
        heads = HeadMatrices.from_layer(model, layer, fold_norm=fold_norms)
        small = heads.v @ (through @ heads.o)  # (H, hd, hd)
        found.append(torch.linalg.eigvals(small.double().cpu()).to(torch.complex64))
        counter.advance()
    return Copying(torch.stack(found))


def _through_vocabulary(model: Transformer, *, fold_norms: bool) -> Tensor:
    """Embeddingᵀ · output, with `fold_norms` times the final norm's weight: float32 (D, D)."""
    args = model.args
    total = torch.zeros(args.dim, args.dim, device=model.device)
    for start in range(0, args.vocab_size, ROWS):
        rows = slice(start, start + ROWS)
        total += vocabulary_rows(model.tok_embeddings, rows).T @ vocabulary_rows(model.output, rows)
    return total * model.norm.weight.float() if fold_norms else total


class HeadCircuit:
    """One head's circuits from token to token, with all norms: `layer` and `head` count from 0.

    `attention_scores` are exact for layer 0 of a model without edits.
    """

    def __init__(self, model: Transformer, layer: int, head: int):
        """Raises RequestError for a head that the model does not have."""
        check_model(model)
        self.model = model
        self.layer = check_index("layer", layer, model.args.n_layers)
        self.head = check_index("head", head, model.args.n_heads)
        with torch.no_grad():
            own = HeadMatrices.from_layer(model, self.layer, fold_norm=False)
        self.q, self.k, self.v, self.o = (each[self.head] for each in (own.q, own.k, own.v, own.o))

    @torch.no_grad()
    def attention_scores(self, queries: Sequence[int], keys: Sequence[int], distance: int = 0) -> Tensor:
        """Scores of query tokens for key tokens `distance` tokens before them: float32 (queries, keys), CPU.

        Before the softmax, divided by √hd. Raises RequestError.
        """
        q = turned(self.model, self.q @ self._normed(queries).T, check_distance(distance))  # (hd, queries)
        return (q.T @ (self.k @ self._normed(keys).T) / math.sqrt(len(self.q))).cpu()

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """What attending to each token adds to all logits: float32 (tokens, V), CPU; up to the final norm's scale."""
        added = self._normed(tokens) @ self.v.T @ self.o.T * self.model.norm.weight.float()  # (tokens, D)
        blocks = range(0, self.model.args.vocab_size, ROWS)
        parts = [added @ vocabulary_rows(self.model.output, slice(start, start + ROWS)).T for start in blocks]
        return torch.cat(parts, 1).cpu()

    def raised(self, token: int, n: int = 10) -> list[tuple[int, float]]:
        """The n tokens whose logits rise most when the head attends to a token: (id, logit); largest first."""
        values, ids = self.logits([token])[0].topk(min(n, self.model.args.vocab_size))
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    @torch.no_grad()
    def copied(self) -> Tensor:
        """How far attending to a token raises its own logit above the mean of all: float32 (V,), CPU.

        In standard deviations over the vocabulary; NaN for an embedding of 0. No matrix is larger than
        (V, hd).
        """
        reads, writes = [], []
        for start in range(0, self.model.args.vocab_size, ROWS):
            rows = slice(start, start + ROWS)
            embedded = self._norm(vocabulary_rows(self.model.tok_embeddings, rows))
            reads.append(embedded @ self.v.T)
            writes.append(vocabulary_rows(self.model.output, rows) * self.model.norm.weight.float() @ self.o)
        read, write = torch.cat(reads), torch.cat(writes)  # (V, hd) each: a logit is the product of two rows
        centred = write - write.mean(0)
        deviation = (read @ (centred.T @ centred / len(write)) * read).sum(1).clamp(min=0).sqrt()
        return ((read * centred).sum(1) / deviation).cpu()

    def top_copied(self, n: int = 10) -> list[tuple[int, float]]:
        """The n tokens that the head copies most: (id, `copied`); most first."""
        values, ids = self.copied().nan_to_num(-math.inf).topk(min(n, self.model.args.vocab_size))
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def _normed(self, tokens: Sequence[int]) -> Tensor:
        """Normed embeddings of tokens, as attention reads them: float32 (tokens, D)."""
        ids = [check_token(self.model, token) for token in tokens]
        return self._norm(self.model.embed(torch.tensor(ids, device=self.model.device)).float())

    def _norm(self, embedded: Tensor) -> Tensor:
        return self.model.layers[self.layer].attention_norm(embedded).float()
