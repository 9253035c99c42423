"""`--steer` in complete and chat: the direction takes effect, and wrong values are reported."""

import pytest
import torch

from conftest import exit_code
from llama_ref import study
from llama_ref.cli.shared.steering import parse
from llama_ref.errors import RequestError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("v.gguf", ("v.gguf", 1.0, None)),
        ("a:b/v.gguf:-0.5", ("a:b/v.gguf", -0.5, None)),
        ("v.gguf@3", ("v.gguf", 1.0, [3])),
        ("v.gguf:2@3-5,9", ("v.gguf", 2.0, [3, 4, 5, 9])),
    ],
)
def test_a_word_is_read(word, expected):
    assert parse(word) == expected


@pytest.mark.parametrize("word", ["", "v.gguf@5-3", "v.gguf@1-2-3", "v.gguf@0-99999999999"])
def test_a_wrong_word_is_named(word):
    with pytest.raises(RequestError, match="--steer"):
        parse(word)


@pytest.fixture(scope="module")
def vector(llama, tmp_path_factory) -> str:
    """Toward " Paris", after layer 28."""
    (token,) = llama.tokenizer.encode(" Paris", bos=False, eos=False)
    toward = 60 * torch.nn.functional.normalize(llama.model.output.weight[token].float(), dim=0)
    path = tmp_path_factory.mktemp("steer") / "v.gguf"
    study.write_control_vector(path, {28: toward})
    return str(path)


def test_complete_and_chat_are_steered(demo_folder, vector, capsys, monkeypatch, tmp_path):
    words = (str(demo_folder), "--max_gen_len", "6", "--temperature", "0", "--steer", f"{vector}:4@28")
    assert exit_code(["complete", words[0], "I like", *words[1:]]) == 0
    assert capsys.readouterr().out.count("Paris") > 2
    (tmp_path / "said.txt").write_text("What do you like?\n")
    with (tmp_path / "said.txt").open() as said:
        monkeypatch.setattr("sys.stdin", said)
        assert exit_code(["chat", *words]) == 0
    assert capsys.readouterr().out.count("Paris") > 2


def test_a_wrong_file_or_layer_is_named(demo_folder, vector, capsys):
    for word, said in (
        (f"{vector}@3", "no direction for layer 3, only for 28"),
        ("/nowhere.gguf", "cannot read /nowhere.gguf"),
    ):
        assert exit_code(["complete", str(demo_folder), "I like", "--steer", word]) != 0
        assert said in capsys.readouterr().err
