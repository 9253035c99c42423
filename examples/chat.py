"""Hold a conversation: a system prompt, several questions, answers printed as they are generated.

    python examples/chat.py FOLDER ["a question" ...]

A Session keeps the KV cache, so each turn computes only its own new tokens.
"""

import sys

from llama_ref import Llama, Session

SYSTEM = "You are a helpful assistant."
QUESTIONS = ("What is the capital of France?", "And what is it known for?")


def main(folder: str, *questions: str) -> None:
    session = Session(Llama.build(folder, max_seq_len=2048), system=SYSTEM)
    for question in questions or QUESTIONS:
        print(f"> {question}")
        already = session.cached_tokens
        stream = session.say(question, max_gen_len=64, temperature=0)
        for piece in stream:
            print(piece, end="", flush=True)
        print(f"\n[{already} of {len(stream.row.prompt)} prompt tokens were cached]", file=sys.stderr)
    roles = [message["role"] for message in session.dialog]
    print(f"[the dialog has {len(roles)} messages: {', '.join(roles)}]", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
