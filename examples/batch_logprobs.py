"""Score sentences: how likely is each token of several texts, of any length, for the model?

    python examples/batch_logprobs.py FOLDER ["a text" ...]

All texts run in one batch. Nothing is generated: max_gen_len=0, and echo returns the prompts.
"""

import math
import sys

from llama_ref import Llama

TEXTS = ("The sky is blue.", "The sky is made of cheese.", "서울은 한국의 수도이다.")


def main(folder: str, *texts: str) -> None:
    texts = texts or TEXTS
    llama = Llama.build(folder, max_seq_len=256, max_batch_size=len(texts))
    results = llama.text_completion(list(texts), max_gen_len=0, logprobs=True, echo=True)
    for text, result in zip(texts, results, strict=True):
        scores = result["logprobs"][1:]  # begin-of-text comes first and has no probability
        perplexity = math.exp(-sum(scores) / len(scores))
        surprise, token = min(zip(scores, result["tokens"][1:], strict=True))
        print(f"{perplexity:8.1f}  {text}  (least expected: {token!r}, {-surprise:.1f} nats)")


if __name__ == "__main__":
    main(*sys.argv[1:])
