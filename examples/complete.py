"""Continue a text and print the continuation as it is generated.

    python examples/complete.py FOLDER ["a prompt"]

FOLDER is a checkpoint folder or the name of a release under ~/.llama/checkpoints.
"""

import sys

from llama_ref import Llama


def main(folder: str, prompt: str = "The capital of France is") -> None:
    llama = Llama.build(folder, max_seq_len=512)
    stream = llama.stream(prompt, max_gen_len=64, temperature=0.6, top_p=0.9, seed=1, stop="\n\n")
    print(prompt, end="", flush=True)
    for piece in stream:  # never half a character, so it can be printed at once
        print(piece, end="", flush=True)
    print(f"\n[{len(stream.tokens)} tokens, ended by {stream.finish_reason}]", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
