"""Let a model use a calculator: question, call, result, answer.

    python examples/tools.py FOLDER ["a question"]

The model only writes calls, and this program decides what they do: no text of the model is
evaluated. Llama 3.1 and later call tools; other models mostly answer without them.
"""

import operator
import sys

from llama_ref import Llama, Message

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def calculate(a: float, operation: str, b: float) -> str:
    """Calculate with two numbers.

    Args:
        operation: One of + - * /
    """
    return f"{OPERATIONS[operation](float(a), float(b)):g}"


def main(folder: str, question: str = "What is 17 * 23?") -> None:
    llama = Llama.build(folder, max_seq_len=2048)
    dialog: list[Message] = [{"role": "user", "content": question}]
    for _ in range(4):  # a model may call again and again
        [prediction] = llama.chat_completion([dialog], temperature=0, max_gen_len=128, tools=[calculate])
        dialog.append(prediction["generation"])
        for call in dialog[-1].get("tool_calls", []):
            try:
                result = calculate(**call["arguments"])
            except Exception as error:  # for the model to read, and to try again
                result = f"error: {error!r}"
            print(f"{call['tool_name']} {call['arguments']}: {result}")
            dialog.append({"role": "tool", "content": result})
        if dialog[-1]["role"] == "assistant":
            break
    print(dialog[-1]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
