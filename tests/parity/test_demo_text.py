"""On real weights, greedy bfloat16 text follows Meta's reference until the two likeliest tokens are nearly tied."""

import pytest
import torch
from llama_models.llama3.model import Transformer as MetaTransformer

from llama_ref.generation import Llama
from parity.oracles import metas_model

pytestmark = pytest.mark.usefixtures("one_process_group")
N_TOKENS = 24
# Logits here are around 20, where bfloat16 steps by 0.125; the hidden states behind them carry several such roundings.
NEAR_TIE = 0.25
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
)
QUESTIONS = ("What is the capital of France?", "Name three colours.")


@pytest.fixture(scope="module")
def demo_bfloat16(demo_folder) -> Llama:
    return Llama.build(demo_folder, max_seq_len=256, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def metas(demo_bfloat16: Llama) -> MetaTransformer:
    return metas_model(demo_bfloat16.model, max_seq_len=256)


def batches(llama: Llama) -> list[list[list[int]]]:
    """The prompts in one batch, each question alone."""
    dialogs = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [[llama.encode(prompt) for prompt in PROMPTS], *([llama.encode(dialog)] for dialog in dialogs)]


@torch.inference_mode()
def test_greedy_text_follows_metas_reference(demo_bfloat16: Llama, metas: MetaTransformer):
    agreed = []
    for batch in batches(demo_bfloat16):
        answers, _ = demo_bfloat16.generate(batch, N_TOKENS, temperature=0)
        for prompt, ours in zip(batch, answers, strict=True):
            logits = metas(torch.tensor([prompt + ours]), 0)[
                0, len(prompt) - 1 : -1
            ]  # what Meta's model would choose at each step
            behind = logits.amax(-1) - logits[torch.arange(len(ours)), torch.tensor(ours)]
            assert behind.max() <= NEAR_TIE, f"token {behind.argmax()} is {behind.max():.2f} behind Meta's choice"
            agreed += (behind == 0).tolist()
    assert sum(agreed) >= 0.95 * len(agreed)


def test_the_capital_of_france_is_paris(demo_bfloat16: Llama):
    [answer] = demo_bfloat16.text_completion(["The capital of France is"], temperature=0, max_gen_len=8)
    assert answer["generation"].startswith(" Paris")
