"""What stays on a model after Ctrl-C: nothing, wherever it comes."""

from interruptions import assert_prints_no_step

AT_MANY_STEPS = """
import torch
from interruptions import interrupt
from random_models import grouped_model
from llama_ref import study
from study.leftovers import state_of

model, text = grouped_model(layers=1), [1, 2, 3]
before, expected = state_of(model), study.trace(model, text, "norm")["norm"]

def patched():
    with study.patch(model, {"layers.0.ffn.output": study.zero()}):
        study.trace(model, text, "layers.0.residual_post")

def is_fine_after(step):
    interrupt(patched, step)
    return state_of(model) == before and torch.equal(study.trace(model, text, "norm")["norm"], expected)

print([step for step in range(1, 22000, 29) if not is_fine_after(step)])
"""


def test_after_ctrl_c_at_any_step_nothing_is_left_on_the_model(warm):
    assert_prints_no_step(warm / "python", AT_MANY_STEPS)
