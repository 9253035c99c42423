"""Let a model (Llama 3.1 or later) call a Python function: question, call, result, answer.

Run `python examples/tools.py FOLDER ["a question"]`. The model only writes calls; this program
decides what they do, and returns errors for the model to read.
"""

import sys

from llama_ref import Llama


def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""
    return float(a) * float(b)


TOOLS = {"multiply": multiply}
llama = Llama.build(sys.argv[1], max_seq_len=2048)
dialog = [{"role": "user", "content": " ".join(sys.argv[2:]) or "What is 17 * 23?"}]
while dialog[-1]["role"] != "assistant":  # a model may call again and again
    [prediction] = llama.chat_completion([dialog], tools=TOOLS.values(), temperature=0)
    dialog.append(prediction["generation"])
    for call in dialog[-1].get("tool_calls", []):
        try:
            result = str(TOOLS[call["tool_name"]](**call["arguments"]))
        except Exception as error:  # the model may try again
            result = f"error: {error!r}"
        print(f"{call['tool_name']} {call['arguments']}: {result}")
        dialog.append({"role": "tool", "content": result})
print(dialog[-1]["content"])
