"""`llama-ref features`: features that fire in a text, contexts of a feature, the HTML page."""

import re
from typing import get_args

import pytest
import torch

from conftest import exit_code, parsed
from folders import tiny_folder
from llama_ref import Llama, study
from llama_ref.cli.commands.features import Site
from llama_ref.study.features.sites import ENDINGS
from make_example_features import make_example_features
from study import feature_folders


@pytest.fixture
def run(capsys):
    """Run a command line in this process; return (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        return exit_code(("features", *words)), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A checkpoint of two layers and 32 dimensions; each token is a byte."""
    return str(tiny_folder(tmp_path_factory.mktemp("study") / "Tiny"))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    return str(feature_folders.sparsify(tmp_path_factory.mktemp("features"), 32, 64, k=3).path)


@pytest.fixture(scope="module")
def transcoder(tmp_path_factory) -> str:
    return str(feature_folders.cross_layer(tmp_path_factory.mktemp("transcoder"), 32, 48, 2).path)


def test_features_at_each_token(run, tiny, autoencoder):
    code, out, err = run(tiny, autoencoder, "abc", "--dtype", "float32", "--top", "2")
    assert (code, err) == (0, "")
    llama = Llama.build(tiny, dtype="float32")
    tokens = llama.encode("abc")
    features = study.open_features(autoencoder)
    values = features.encode(study.trace(llama.model, tokens, features.reads))[0]
    for position, (name, own) in enumerate(zip((r"<\|begin_of_text…", "a", "b", "c"), values, strict=True)):
        best = own.topk(2)
        strongest = "  ".join(f"{i} {value:.3g}" for value, i in zip(best.values, best.indices.tolist(), strict=True))
        assert re.search(rf"^ {name}@{position} +{int((own != 0).sum())} +{re.escape(strongest)} *$", out, re.MULTILINE)
    assert "sparsify: 64 features of layers.1.residual_post" in out
    code, out, err = run(tiny, autoencoder, "abc", "--dtype", "float32", "--json")
    found = parsed(out)
    assert (code, found["reads"], found["writes"], found["n_features"]) == (0, features.reads, [features.reads], 64)
    assert [token["id"] for token in found["tokens"]] == tokens
    for token, own in zip(found["tokens"], values, strict=True):
        expected = {i: pytest.approx(float(own[i]), abs=1e-5) for i in own.nonzero()[:, 0].tolist()}
        assert {each["feature"]: each["value"] for each in token["features"]} == expected


def test_the_best_contexts_in_a_file(run, tiny, autoencoder, tmp_path):
    texts = ["hello there", "once upon a time", "zzz"]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    llama = Llama.build(tiny, dtype="float32")
    features = study.open_features(autoencoder)
    values = [features.encode(study.trace(llama.model, llama.encode(text), features.reads))[0] for text in texts]
    feature = int(values[1].amax(0).argmax())
    silent = int((torch.cat(values) != 0).any(0).logical_not().nonzero()[0])
    words = (tiny, autoencoder, "--contexts", str(file), "--feature", f"{feature},{silent}", "--dtype", "float32")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    best = max(range(3), key=lambda i: values[i][:, feature].max())
    position = int(values[best][:, feature].argmax())
    first = re.search(r"^ (\S+) +(\d) +(\d+)  (.*«.+».*)$", out, re.MULTILINE)
    assert first.group(1, 2, 3) == (f"{values[best][position, feature]:.3g}", str(best + 1), str(position))
    assert f"Feature {silent} fires nowhere in these texts." in out
    code, out, err = run(*words, "--json", "--top", "1")
    (own, none) = parsed(out)["features"]
    assert (own["feature"], none["contexts"]) == (feature, []) and len(own["contexts"]) == 1
    context = own["contexts"][0]
    assert (context["text"], context["position"]) == (best, position)
    assert context["tokens"][context["at"]]["value"] == context["value"]


def test_all_layers_of_a_cross_layer_transcoder(run, tiny, transcoder, tmp_path):
    llama = Llama.build(tiny, dtype="float32")
    opened, tokens = study.open_cross_layer(transcoder), llama.encode("abc")
    values = opened.encode(study.trace(llama.model, tokens, opened.reads))
    code, out, err = run(tiny, transcoder, "abc", "--dtype", "float32", "--json")
    found = parsed(out)
    assert (code, err, found["reads"], found["writes"]) == (0, "", list(opened.reads), list(opened.writes))
    assert found["n_features"] == 2 * 48
    for position, token in enumerate(found["tokens"]):
        fired = [(each["layer"], each["feature"], each["value"]) for each in token["features"]]
        expected = [(layer, i, float(own[0, position, i])) for layer, own in enumerate(values) for i in range(48)]
        expected = [(layer, i, pytest.approx(value, abs=1e-5)) for layer, i, value in expected if value]
        assert sorted(fired) == expected and {layer for layer, _, _ in fired} == {0, 1}
        assert fired == sorted(fired, key=lambda each: -abs(each[2])), "the strongest of all layers first"
    code, out, _ = run(tiny, transcoder, "abc", "--dtype", "float32", "--top", "1", "--out", str(tmp_path / "page.html"))
    strongest = [token["features"][0] for token in found["tokens"]]
    shown = re.findall(r"@\d +\d+ +(\d+):(\d+) [\d.]+ *$", out, re.MULTILINE)
    assert shown == [(str(each["layer"]), str(each["feature"])) for each in strongest]
    assert "96 features of layers.0.ffn.norm to layers.1.ffn.norm, which make layers.0.ffn.output to" in " ".join(out.split())
    first = parsed(run(tiny, f"{transcoder}/W_enc_0.safetensors", "abc", "--json")[1])
    assert (first["reads"], first["n_features"]) == (opened.reads[0], 48), "a file is of its layer"
    label = f"{strongest[0]['layer']}:{strongest[0]['feature']}"
    assert f'"{label}":[[0,' in (tmp_path / "page.html").read_text()
    file = tmp_path / "texts.txt"
    file.write_text("abc")
    code, out, _ = run(tiny, transcoder, "--contexts", str(file), "--feature", label, "--dtype", "float32", "--json")
    contexts = parsed(out)
    assert contexts["reads"] == opened.reads[strongest[0]["layer"]]
    [context] = contexts["features"][0]["contexts"]
    assert context["tokens"][0]["value"] == pytest.approx(strongest[0]["value"], abs=1e-5)
    assert run(tiny, transcoder, "--contexts", str(file), "--feature", f"{label},{label[0]}:0", "--json")[0] == 0


def test_a_page_with_features(run, tiny, autoencoder, tmp_path):
    page = tmp_path / "page.html"
    code, _, err = run(tiny, autoencoder, "abc", "--out", str(page))
    assert code == 0 and err.endswith(f"wrote {page}: open it in a browser\n")
    assert '"where":"layers.1.residual_post"' in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{}", "{sae}"), "pass a text, to see which features fire in it, or --contexts and --feature"),
        (("{}", "{sae}", "abc", "--feature", "1"), "--feature and --contexts go together"),
        (("{}", "{sae}", "abc", "--feature", "1", "--contexts", "x"), "pass a text, to see which features fire in it, or"),
        (
            ("{}", "{sae}", "--contexts", "{}/params.json", "--feature", "64"),
            "feature is 64, expected a whole number from 0 to 63",
        ),
        (("{}", "{sae}", "--contexts", "{}/params.json", "--feature", "-1"), "--feature is '-1', expected a number"),
        (("{}", "{sae}", "--contexts", "/no", "--feature", "1"), "cannot read /no"),
        (
            ("{}", "{clt}", "--contexts", "{}/params.json", "--feature", "0:1,1:2"),
            "--feature is '0:1,1:2', with features of several layers",
        ),
        (
            ("{}", "{clt}", "--contexts", "{}/params.json", "--feature", "0:1", "--layer", "1"),
            "--feature is '0:1', with features of several",
        ),
        (
            ("{}", "{clt}", "--contexts", "{}/params.json", "--feature", "1"),
            "{clt} has features of every layer: choose one layer, such as",
        ),
        (("{}", "{clt}", "--contexts", "{}/params.json", "--feature", "0:1:2"), "--feature is '0:1:2', expected a number"),
        (("{}", "{clt}", "--contexts", "{}/params.json", "--feature", "2:1"), "cannot read {clt}/W_enc_2.safetensors"),
        (("{}", "{sae}", "abc", "--top", "0"), "--top is 0"),
        (("{}", "{sae}", "abc", "--layer", "0"), "is not clear: the caller says 0, but the folder's name says 1"),
        (("{}", "{sae}", ""), "prompt is empty"),
        (("{}", "{}", "abc"), r"consolidated\.00\.pth lacks encoder_linear\.weight"),
        (("{}", "{wide}", "abc"), "has features of 48 dimensions, up to layer 1, but the model has 32"),
        (("nowhere-at-all", "{sae}", "abc"), "nowhere-at-all"),
    ],
)
def test_misuse_is_a_line(run, tiny, autoencoder, transcoder, tmp_path, words, message):
    wide = str(feature_folders.sparsify(tmp_path, 48, 96).path)
    places = {"{}": tiny, "{sae}": autoencoder, "{clt}": transcoder, "{wide}": wide}
    message, *words = (re.sub(r"{\w*}", lambda found: places[found[0]], word) for word in (message, *words))
    code, out, err = run(*words)
    assert (code in (1, 2), out) == (True, "")
    assert re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1


def test_several_processes_are_refused(run, tiny, autoencoder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(tiny, autoencoder, "abc")
    assert (code, out) == (2, "") and "2 processes: a study needs the whole model in one" in err


def test_features_that_were_made_of_examples(tiny, tmp_path):
    """scripts/make_example_features.py: a feature fires most at the token that it was made from."""
    features = study.open_features(make_example_features(Llama.build(tiny, dtype="float32"), 1, tmp_path, n_texts=1))
    assert (features.reads, features.form) == ("layers.1.residual_post", "sparsify")
    direction = features.direction(5)
    at_example = features.weights.decoder_bias + 10 * direction
    assert features.active(at_example[None]).at(0)[0] == (5, pytest.approx(10, abs=1e-3))


def test_the_sites_of_features_are_those_that_can_be_opened(run):
    assert get_args(Site) == tuple(ENDINGS)
    code, _, err = run("anywhere", "anything", "--site", "residual_pst")
    assert code == 2 and "did you mean residual_post?" in err
