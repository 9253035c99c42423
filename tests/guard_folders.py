"""A tiny Llama Guard whose verdict is known: unsafe if the conversation has the word " bomb"."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llama_ref.checkpoint.integrity import write_checklist
from make_random_checkpoint import make_random_checkpoint

BOMB, UNSAFE, SAFE = 13054, 39257, 19193  # Llama 3's tokenizer
N_RANKS = UNSAFE + 1  # of the fixture `shorter_tokenizer_path`
BOS, EOT = N_RANKS, N_RANKS + 9
PARAMS: dict[str, Any] = {
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,  # can be split between two processes
    "n_kv_heads": 2,
    "vocab_size": N_RANKS + 256,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LAST = (271, 60)  # the prompt's last token: "\n\n" after Guard 3's header, "]" of Guard 2's "[/INST]"
ANSWER = (UNSAFE, 198, 50, 24, 21861, 17, EOT)  # "unsafe\nS9,S2"


def guard_folder(path: Path, tokenizer: Path, answer: tuple[int, ...] = ANSWER, calm: int = SAFE) -> Path:
    """A complete folder.

    Attention is uniform and carries one feature, " bomb"; the rest is a bigram model. `calm` is the
    likeliest first token without that word.
    """
    make_random_checkpoint(path, PARAMS, tokenizer=tokenizer, dtype=torch.float32)
    tensors = torch.load(path / "consolidated.00.pth")
    for name, tensor in tensors.items():
        tensor.fill_(1 if name.endswith("norm.weight") else 0)
    embedding, output = tensors["tok_embeddings.weight"], tensors["output.weight"]
    prompt, word, alarm, first = range(4)  # features
    for token in LAST:
        embedding[token, prompt] = 1
    embedding[BOMB, word] = 1
    tensors["layers.0.attention.wv.weight"][word, word] = 1
    tensors["layers.0.attention.wo.weight"][alarm, word] = 1000  # outweighs `prompt`, however long that is
    output[calm, prompt] = 5
    output[answer[0], alarm] = 5
    for i, (token, following) in enumerate(pairwise(answer)):
        embedding[token, first + i] = 1e6
        output[following, first + i] = 5
    torch.save(tensors, path / "consolidated.00.pth")
    write_checklist(path, force=True)
    return path
