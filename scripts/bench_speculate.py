"""Compare decoding with and without speculation, on text that repeats and on text that does not.

    python scripts/bench_speculate.py [--ckpt_dir checkpoints/SmolLM2-135M-Instruct] [--draft NAME] [--gen_len 96] [--rounds 5]
                                      [--quantize int8] [--compile] [--dtype bfloat16] [--passes]

One sequence at a time, greedy and sampled (temperature 0.8, top_p 0.95, one seed), in alternating
rounds. Drafts come from n-grams of the text, or from the model that `--draft` names. First it
prints the time of a pass over several tokens, in decode steps, and the line fitted to it, from
which draft lengths are chosen (PassTime in decoding/drafting.py); `--passes` prints only that.
Ratios are medians over the rounds; on a busy machine only the ratios are meaningful.
"""

import statistics
import sys
import time
from typing import Annotated

import torch

from llama_ref import Llama
from llama_ref.cli.parsing.flags import Flag
from llama_ref.cli.parsing.parser import command, run
from llama_ref.cli.shared.options import Compile, Dtype, Name, Quantize
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.drafting import LONGEST_DRAFT, PassTime
from llama_ref.decoding.row import Row
from llama_ref.machine.onednn import onednn_for

CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Dublin", "Athens", "Oslo", "Prague", "Warsaw")
LIST = "\n".join(f"{i}. {city}" for i, city in enumerate(CITIES, 1))
CODE = '''def total(prices, rate):
    """Sum of the prices with tax."""
    result = 0
    for price in prices:
        result += price * (1 + rate)
    return result
'''
ARTICLE = (
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses 7,000,000 square "
    "kilometres, of which 5,500,000 are covered by the rainforest. The majority of the forest is contained within Brazil."
)
TEXTS = {
    "repeats: a list to copy": f"Copy this list exactly.\n\n{LIST}\n\nThe copy:\n\n1. Paris\n2.",
    "repeats: code, one change": f"{CODE}\nThe same with the function renamed to sum_up:\n\ndef sum_up(prices, rate):\n",
    "repeats: a text to quote": f"{ARTICLE}\n\nThe text again, word for word:\n\nThe Amazon rainforest covers",
    "partly: new code": "class BankAccount:\n    def __init__(self, owner, balance):\n        self.owner = owner\n",
    "does not: a story": "It was a dark and stormy night, and the keeper of the lighthouse",
    "does not: an explanation": "The sky is blue because the air scatters light. In more detail, sunlight",
}
SAMPLINGS = {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 5}}


@command()
def main(
    ckpt_dir: Name = "checkpoints/SmolLM2-135M-Instruct",
    *,
    draft: Annotated[str | None, Flag("draft with this model", metavar="NAME", unset="with n-grams")] = None,
    gen_len: Annotated[int, Flag("tokens to generate")] = 96,
    rounds: Annotated[int, Flag("number of measurements of each")] = 5,
    quantize: Quantize = None,
    compile: Compile = False,
    dtype: Annotated[Dtype, Flag("data type of weights and activations")] = "bfloat16",
    passes: Annotated[bool, Flag("only measure passes over several tokens")] = False,
) -> None:
    """Compare speculative with ordinary decoding."""
    quick = Llama.build(
        ckpt_dir,
        device="cpu",
        dtype=dtype,
        max_seq_len=2048,
        quantize=quantize,
        compile=compile,
        draft=draft,
        speculate=None if draft else "ngram",
    )
    plain = Llama(quick.model, quick.tokenizer, max_seq_len=quick.max_seq_len)
    _print_passes(plain, rounds)
    if passes:
        return
    print(f"\n{'text':<28}{'':<10}{'ratio':>6}{'low':>7}{'high':>7}{'tokens/s':>10}{'drafted':>9}{'accepted':>9}{'passes':>8}")
    for name, text in TEXTS.items():
        for kind, sampling in SAMPLINGS.items():
            prompt, ratios, rates = plain.encode(text), [], []
            for _ in range(rounds):
                without, _ = _rate(plain, prompt, gen_len, sampling)
                rate, row = _rate(quick, prompt, gen_len, sampling)
                ratios.append(rate / without)
                rates.append(rate)
            print(
                f"{name:<28}{kind:<10}{statistics.median(ratios):6.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
                f"{statistics.median(rates):10.1f}{row.drafted:9}{row.accepted:9}{row.passes:8}"
            )
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {gen_len} tokens each, {rounds} rounds")


def _rate(llama: Llama, prompt: list[int], gen_len: int, sampling: dict) -> tuple[float, Row]:
    """Tokens per second after the first, and the row; without stop tokens, lengths are equal."""
    unstopped = {"logit_bias": dict.fromkeys(llama.tokenizer.stop_tokens, float("-inf"))}
    stream = llama.stream(prompt, gen_len, **sampling, **unstopped)
    first = None  # (time, tokens so far)
    for _ in stream:
        first = first or (time.perf_counter(), len(stream.tokens))
    return (len(stream.tokens) - first[1]) / (time.perf_counter() - first[0]), stream.row


@torch.inference_mode()
def _print_passes(llama: Llama, rounds: int) -> None:
    """Print the time of passes over several tokens, after 256 tokens, relative to a decode step."""
    cache = new_cache(llama.model, 1, 256 + LONGEST_DRAFT + 1)
    times: dict[int, list[float]] = {n: [] for n in (1, 2, 3, 5, 9, LONGEST_DRAFT + 1)}
    for _ in range(3 * rounds):
        for n, measured in times.items():
            cache.truncate([256])
            tokens = torch.ones(1, n, dtype=torch.long)
            start = time.perf_counter()
            with onednn_for(tokens, llama.dtype):
                llama.model(tokens, cache)
            measured.append(time.perf_counter() - start)
    medians = {n: statistics.median(measured) for n, measured in times.items()}
    assumed = PassTime.for_model(llama.model)
    print(f"{'tokens in a pass':<20}{'ms':>8}{'decode steps':>16}{'as assumed':>12}")
    for n, seconds in medians.items():
        print(f"{n:<20}{seconds * 1e3:8.1f}{seconds / medians[1]:16.2f}{assumed.with_guesses(n - 1):12.2f}")
    each, several = statistics.linear_regression([*medians][1:], [seconds / medians[1] for seconds in medians.values()][1:])
    print(f"fitted line: {several:.2f} + {each:.3f} per token")


if __name__ == "__main__":
    sys.exit(run(main))
