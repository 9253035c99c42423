"""The facts about a generation that must be the same on all processes of a job.

Agreement compares them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import asdict

from llama_ref.formatting import comma_list
from llama_ref.images import Tiles
from llama_ref.kv_cache import KVCache
from llama_ref.parallel.agreement import digest
from llama_ref.sampling import SamplingParams

MOST_LISTED = 8  # prompt lengths shown in a message


def generation_facts(
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[Tiles]],
    max_gen_lens: Sequence[int],
    params: SamplingParams,
    stop: str | Sequence[str],
    *,
    cache: KVCache | None = None,
    prompt_logprobs: bool = False,
) -> dict[str, object]:
    """Facts about one generation, by argument name.

    The seed is not included: rank 0 samples the tokens for all processes, so seeds may differ.
    """
    lengths = comma_list([len(prompt) for prompt in prompts], MOST_LISTED)
    pixels = b"".join(image.pixels.numpy().tobytes() for row in images for image in row)
    ids = b"".join(array("q", [len(prompt), *prompt]).tobytes() for prompt in prompts)
    return {
        "the prompt": f"{lengths} tokens (digest {digest(ids)})",
        "the images": f"{sum(map(len, images))} (digest {digest(pixels)})",
        "max_gen_len": max_gen_lens[0] if len(set(max_gen_lens)) == 1 else list(max_gen_lens),
        **{name: value for name, value in asdict(params).items() if name != "seed"},
        "stop": [stop] if isinstance(stop, str) else list(stop),
        "echo with logprobs": prompt_logprobs,
        "the number of cached tokens": cache.longest if cache else 0,
    }
