"""What stays on a model after Ctrl-C: nothing, wherever it comes."""

import os
import subprocess

from conftest import REPOSITORY

AT_MANY_STEPS = """
import signal, sys
import torch
from random_models import grouped_model
from llama_ref import study
from study.leftovers import state_of

model, text = grouped_model(layers=1), [1, 2, 3]
before, expected = state_of(model), study.trace(model, text, "norm")["norm"]

def patched():
    with study.patch(model, {"layers.0.ffn.output": study.zero()}):
        study.trace(model, text, "layers.0.residual_post")

def interrupted_at(step):
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"  # an exception at another event would end a generator without its `finally`
        if event == "opcode" and steps == step:
            signal.raise_signal(signal.SIGINT)
        return count

    sys.settrace(count)
    try:
        patched()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return state_of(model) == before and torch.equal(study.trace(model, text, "norm")["norm"], expected)

print([step for step in range(1, 22000, 29) if not interrupted_at(step)])
"""


def test_after_ctrl_c_at_any_step_nothing_is_left_on_the_model(warm):
    done = subprocess.run(
        [warm / "python", "-c", AT_MANY_STEPS],
        cwd=REPOSITORY / "tests",
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-1000:]
