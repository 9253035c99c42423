"""oneDNN's process-wide flag, set by passes in several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from interruptions import assert_prints_no_step
from llama_ref.args import ModelArgs
from llama_ref.decoding.loop import steps
from llama_ref.decoding.row import Row
from llama_ref.machine.onednn import onednn_for
from random_models import random_model

# Matrices large enough for oneDNN, whose products differ from PyTorch's in the last bits.
ARGS = ModelArgs.from_dict(
    {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 500, "multiple_of": 32}
    | {"norm_eps": 1e-5, "rope_theta": 500000.0}
)


def is_enabled() -> bool:
    return torch.backends.mkldnn.enabled


def ids(n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.long)


@pytest.mark.parametrize(
    ("n", "dtype", "off"), [(1, torch.bfloat16, True), (2, torch.bfloat16, False), (1, torch.float32, False)]
)
def test_it_is_off_for_one_token_in_bfloat16_and_nothing_else(n, dtype, off):
    before = is_enabled()
    with pytest.raises(KeyboardInterrupt), onednn_for(ids(n), dtype):
        assert is_enabled() == (before and not off)
        raise KeyboardInterrupt
    assert is_enabled() == before


AT_MANY_STEPS = """
import threading
import torch
from interruptions import interrupt
from llama_ref.machine.onednn import onednn_for

one, two = torch.zeros(1, 1), torch.zeros(1, 2)

def passes():
    for tokens in (one, two, one):
        with onednn_for(tokens, torch.bfloat16):
            assert torch.backends.mkldnn.enabled == (tokens is two)

def is_fine_after(step):
    interrupt(passes, step)
    passes()
    other = threading.Thread(target=passes, daemon=True)
    other.start()
    other.join(20)
    return not other.is_alive() and torch.backends.mkldnn.enabled

print([step for step in range(1, 2000, 5) if not is_fine_after(step)])
"""


def test_after_ctrl_c_at_any_step_passes_run_and_the_flag_is_as_before(warm):
    assert_prints_no_step(warm / "python", AT_MANY_STEPS)


def test_a_user_who_switched_it_off_keeps_it_off():
    with torch.backends.mkldnn.flags(enabled=False):
        for n in (1, 2):
            with onednn_for(ids(n), torch.bfloat16):
                assert not is_enabled()
            assert not is_enabled()


def test_passes_of_one_kind_run_together_and_the_other_kind_waits():
    entered, leave = threading.Barrier(3), threading.Event()
    order: list[str] = []

    def step() -> None:
        with onednn_for(ids(1), torch.bfloat16):
            entered.wait(timeout=60)  # two concurrent steps, else the barrier breaks
            leave.wait(timeout=60)
            assert not is_enabled()
            order.append("step")

    def prompt() -> None:
        with onednn_for(ids(2), torch.bfloat16):
            assert is_enabled()
            order.append("prompt")

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(step) for _ in range(2)]
        entered.wait(timeout=60)
        running.append(pool.submit(prompt))
        leave.set()
        for each in running:
            each.result(timeout=60)
    assert order == ["step", "step", "prompt"] and is_enabled()


def test_threads_that_generate_at_once_give_what_one_thread_gives():
    """If each pass saved and restored the flag, answers would differ and the flag stay off."""
    model = random_model(ARGS, seed=0).bfloat16()
    prompts = [[(7 * i + j) % ARGS.vocab_size for j in range(3 + i % 5)] for i in range(40)]

    def answer(prompt: list[int]) -> tuple[list[int], list[float]]:
        row = Row(prompt, 12)
        for _ in steps(model, [row], lambda logits: logits.argmax(-1), stop_tokens=()):
            pass
        return row.generated, row.logprobs

    alone = [answer(prompt) for prompt in prompts]
    before = is_enabled()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, prompts)) == alone
    assert is_enabled() == before
