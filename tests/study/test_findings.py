"""Published findings on language models, reproduced on the demo model's real weights; docs/circuits.md has the table."""

import pytest
import torch

from llama_ref import study
from llama_ref.study.analyses.attention import repeated_tokens

TEXT = "The old lighthouse stood on a rocky cliff above the sea. Every evening the keeper lit the lamp."
POSITION, DIMENSION, UNIT = 0, 507, 1229  # of the massive activation; the unit that writes it in layer 11


@pytest.fixture(scope="module")
def ids(llama):
    return llama.encode(TEXT)


@pytest.fixture(scope="module")
def heads(llama, ids):
    words = sorted(llama.tokenizer.vocabulary.ranks.values())
    return study.summarize_attention(llama.model, ids, bos=llama.tokenizer.bos_id, ids=words)


@torch.no_grad()
def loss(llama, ids):
    return torch.nn.functional.cross_entropy(llama.model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:])).item()


def largest(scores, n):
    return {divmod(i, scores.shape[1]) for i in scores.flatten().argsort(descending=True)[:n].tolist()}


def without_dimensions(dimensions):
    def change(value):
        value[:, POSITION, dimensions] = 0
        return value

    return {"layers.11.residual_post": change}


def test_sinks_previous_token_and_induction_heads(heads):
    """arXiv:2309.17453, 2209.11895."""
    assert (heads.sink > 0.5).float().mean() > 0.2
    assert {(16, 0), (11, 1)} <= largest(heads.previous, 5)
    assert {(18, 6), (17, 3), (17, 4)} <= largest(heads.induction, 5) and heads.induction[18, 6] > 0.8


def test_a_massive_activation_is_one_dimension_of_the_first_token(llama, ids):
    """arXiv:2402.17762."""
    stream = study.trace(llama.model, ids, "layers.11.residual_post")["layers.11.residual_post"][0].abs()
    assert divmod(int(stream.argmax()), stream.shape[1]) == (POSITION, DIMENSION)
    assert stream.max() > 20_000 > 1000 * stream.median()
    whole = loss(llama, ids)
    with study.patch(llama.model, without_dimensions([DIMENSION])):
        assert loss(llama, ids) > whole + 5
    with study.patch(llama.model, without_dimensions([1, 100, 200, 300, 400])):
        assert abs(loss(llama, ids) - whole) < 0.2


def test_one_weight_makes_most_of_it(llama, ids):
    """arXiv:2411.07191."""
    weight = llama.model.layers[11].feed_forward.w2.weight
    assert weight[DIMENSION, UNIT] == 5.875
    hidden = study.trace(llama.model, ids, "layers.11.ffn.hidden")["layers.11.ffn.hidden"][0, POSITION, UNIT]
    written = study.trace(llama.model, ids, "layers.11.ffn.output")["layers.11.ffn.output"][0, POSITION, DIMENSION]
    assert 0.6 < (5.875 * hidden / written).item() < 0.85
    whole = loss(llama, ids)
    with torch.no_grad():
        weight[DIMENSION, UNIT] = 0
        try:
            assert loss(llama, ids) > whole + 1
        finally:
            weight[DIMENSION, UNIT] = 5.875
    assert loss(llama, ids) == whole


def test_without_the_induction_heads_repetition_is_not_predicted(llama, heads):
    words = sorted(llama.tokenizer.vocabulary.ranks.values())
    repeated = repeated_tokens(llama.model, bos=llama.tokenizer.bos_id, ids=words)
    names = [f"layers.{layer}.heads.{head}" for layer, head in largest(heads.induction, 10)]
    found = study.ablate_together(llama.model, repeated, names, study.zero(), controls=1)
    assert found.mean > 3 and max(map(abs, found.control_means)) < 1


def test_the_heads_of_indirect_objects(llama):
    """arXiv:2211.00593: name movers raise the name's logit, negative name movers lower it."""
    texts = [llama.encode(f"When Mary and John went to the store, {name} gave a drink to") for name in ("John", "Mary")]
    metric = study.logit_difference(*(llama.encode(name)[-1] for name in (" Mary", " John")))
    movers = [f"layers.{head}" for head in ("23.heads.3", "29.heads.1", "29.heads.0", "10.heads.0")]
    found = study.patch_path(llama.model, *texts, metric, sender=movers, receivers="logits")
    assert (found.clean, found.corrupted) == pytest.approx((3.74, -7.83), abs=0.05)
    mover, second, negative, idle = found.shares.tolist()
    assert mover > 0.3 and second > 0.15 and negative < -0.1 and abs(idle) < 0.05


def test_few_layers_cannot_be_left_out(llama, ids):
    """arXiv:2403.17887."""
    first, *middle = (study.ablate_together(llama.model, ids, f"layers.{i}", study.zero()).mean for i in (0, 5, 14, 21))
    assert first > 4 and max(map(abs, middle)) < 0.6
