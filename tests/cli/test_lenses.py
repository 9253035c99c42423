"""`tune_lens`, `lens --tuned`, `saliency` and `patch --noise`: tables, JSON, files, misuse."""

import re

import pytest

from conftest import parsed
from folders import tiny_folder
from llama_ref import Llama, study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A checkpoint of two layers and four heads; each token is a byte."""
    return str(tiny_folder(tmp_path_factory.mktemp("lenses") / "Tiny"))


@pytest.fixture
def book(tmp_path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat. " * 20, encoding="utf-8")
    return str(path)


def test_a_lens_is_fitted_and_read(run, tiny, book, tmp_path):
    folder = str(tmp_path / "lens")
    words = ("--context", "17", "--steps", "8", "--tokens_per_step", "64")
    code, out, err = run("tune_lens", tiny, book, "--to", folder, *words)
    assert (code, err) == (0, "")
    rows = re.findall(r"^ (embedding|layer [01]) +([\d.]+) +([\d.]+) +[\d.e-]+% +[\d.e-]+% *$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["embedding", "layer 0", "layer 1"] and rows[2][1:] == ("0.00", "0.00")
    assert f"llama-ref lens … --tuned {folder}" in out.replace("\n", " ")
    code, out, err = run("lens", tiny, "the cat", "--tuned", folder, "--json")
    found = parsed(out)
    assert (code, err, found["tuned"]) == (0, "", True)
    assert [each["point"] for each in found["points"]] == ["embedding", "layers.0.residual_post", "layers.1.residual_post"]
    code, out, _ = run("lens", tiny, "the cat", "--tuned", folder, "--out", str(tmp_path / "a.html"))
    assert code == 0 and "translated by the tuned lens" in out.replace("\n", " ")
    assert '"tuned":true' in (tmp_path / "a.html").read_text(encoding="utf-8")

    found = parsed(run("tune_lens", tiny, book, "--to", f"{folder}-2", *words, "--json")[1])
    assert found["n_tokens"] == 3 * 16 and found["points"][1]["tuned"].keys() == {"kl", "cross_entropy", "calibration_error"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune_lens", "{tiny}", "{book}", "--to", "{tiny}"), "already holds .*: choose another folder for the lens"),
        (("tune_lens", "{tiny}", "nowhere.txt", "--to", "{new}"), "cannot read nowhere.txt: No such file"),
        (("tune_lens", "{tiny}", "{book}", "--to", "{new}", "--steps", "0"), "steps is 0, expected a whole number from 1"),
        (("tune_lens", "{tiny}", "{book}", "--to", "{new}", "--context", "1"), "context is 1, expected 2 to 8,192"),
        (("tune_lens", "{tiny}", "{book}", "--to", "{new}", "--optimizer", "lion"), "optimizer is 'lion'"),
        (("lens", "{tiny}", "x", "--tuned", "{new}"), "cannot read .*config.json"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, tiny, book, tmp_path, words, message):
    code, out, err = run(*(word.format(tiny=tiny, book=book, new=tmp_path / "new") for word in words))
    assert code in (1, 2) and out == "" and re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1


# ---- saliency


def test_tokens_have_shares_that_add_up(run, tiny, tmp_path):
    words = ("saliency", tiny, "the cat", "--target", "s", "--other", "t")
    code, out, err = run(*words, "--dtype", "float32")
    assert (code, err) == (0, "") and out.startswith("<|begin_of_text|>│t│h│e│␣│c│a│t\n")
    assert len(re.findall(r"^ \S+@[1-7] +[+-]\d\.\d\d", out, re.MULTILINE)) == 7 and "@0" not in out
    assert re.search(r"logit of s above t: \S+, \S+ at the baseline\.", out.replace("\n", " "))
    found = parsed(run(*words, "--dtype", "float32", "--json")[1])
    assert found["shares"][0] == 0 and found["positions"] == list(range(1, 8))
    assert sum(found["shares"]) == pytest.approx(found["total"], abs=1e-5)
    assert found["value"] - found["baseline_value"] - found["total"] == pytest.approx(found["missing"], abs=1e-6)

    page, folder = tmp_path / "a.html", tmp_path / "png"
    code, _, err = run("saliency", tiny, "the", "--answer", "cat", "--out", str(page), "--png", str(folder))
    assert code == 0 and err == f"wrote {page}: open it in a browser\n"
    assert '"saliency":{"answer":"cat"' in page.read_text(encoding="utf-8")
    assert [path.name for path in folder.iterdir()] == ["saliency.png"]
    for method, said in (("gradient", "the length of its gradient"), ("gradient_x_input", "the shares add up to")):
        assert said in run("saliency", tiny, "the", "--method", method)[1].replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--answer", "a", "--target", "b"), "--answer is given with --target or --other"),
        (("--answer", ""), 'answer is empty, expected a text such as " Paris"'),
        (("--steps", "0"), "steps is 0"),
        (("--method", "gradient", "--steps", "8"), "--method is gradient, but --steps and --baseline are only for integrated"),
        (("--method", "gradient_x_input", "--baseline", "zero"), "--steps and --baseline are only for integrated"),
        (("--method", "magic"), "method is 'magic'"),
    ],
)
def test_saliency_that_makes_no_sense_is_one_line(run, tiny, words, message):
    code, out, err = run("saliency", tiny, "x", *words)
    assert (code, out) == (2, "") and re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1


# ---- causal tracing, and grids on the page


def test_noise_on_a_piece_of_the_text_takes_the_place_of_another_text(run, tiny, tmp_path):
    page = tmp_path / "a.html"
    words = ("patch", tiny, "the cat", "--noise", "cat", "--target", "s", "--noise_seeds", "2", "--dtype", "float32")
    code, out, err = run(*words, "--by", "both", "--out", str(page))
    assert (code, err) == (0, f"wrote {page}: open it in a browser\n")
    assert "with noise on c@5, a@6, t@7: 3 standard deviations of the embedding, mean of 2 runs" in out
    assert '"patched":{"exact":[[' in page.read_text(encoding="utf-8")
    found = parsed(run(*words, "--json")[1])
    assert found["noise"] == {"positions": [5, 6, 7], "scale": 3.0, "seeds": [0, 1]}
    llama = Llama.build(tiny, dtype="float32", device="cpu")
    clean, noisy = llama.encode("the cat"), study.noise([5, 6, 7], 3.0, 2)
    grid = study.patch_grid(llama.model, clean, noisy, study.probability(ord("s")))
    assert found["values"] == grid.values.tolist() and found["corrupted"] == grid.corrupted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("the cat", "the dog", "--noise", "cat"), "CORRUPTED and --noise are given"),
        (("the cat",), "missing CORRUPTED or --noise"),
        (("the cat", "--noise", "dog"), "--noise is 'dog', which is not in the text"),
        (("the cat", "--noise", "t"), "--noise is 't', which is 2 times in the text"),
        (("the cat", "--noise", ""), "--noise is empty"),
        (("the cat", "--noise", "cat", "--noise_scale", "0"), "scale is 0.0, expected a number above 0"),
        (("the cat", "--noise", "cat", "--noise_seeds", "0"), "seeds is"),
    ],
)
def test_noise_that_makes_no_sense_is_one_line(run, tiny, words, message):
    code, out, err = run("patch", tiny, *words, "--target", "s")
    assert (code, out) == (2, "") and re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1
