"""The study commands, `llama-ref lens` and the others: tables, JSON, files, misuse."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import statistics
import struct
import subprocess
import termios
from pathlib import Path

import pytest
import torch

from conftest import parsed
from folders import byte_tokenizer, tiny_folder
from make_random_checkpoint import make_random_checkpoint
from study.pictured import PARAMS, picture

CAPITAL, ITALY, PARIS, ROME = "The capital of France is", "The capital of Italy is", " Paris", " Rome"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A checkpoint of two layers and four heads; each token is a byte."""
    return str(tiny_folder(tmp_path_factory.mktemp("study") / "Tiny"))


# ---- on the real small model


def test_the_lens_shows_the_answer_rising(run, demo_folder):
    code, out, err = run("lens", str(demo_folder), CAPITAL, "--target", PARIS)
    assert (code, err) == (0, "")
    assert out.startswith("<|begin_of_text|>│The│␣capital│␣of│␣France│␣is\n")
    rows = re.findall(r"^ (embedding|layer \d+) +(\S+) +([\d,]+) +\d+\.\d\d +\d+\.\d\d  (\S.*?) *$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["embedding", *(f"layer {i}" for i in range(30))]
    assert int(rows[10][2].replace(",", "")) > 100 and rows[-1][2] == "1"
    assert re.match(r"␣Paris [78]\d%  ", rows[-1][3])
    assert re.search(r"␣Paris is the likeliest from layer 2\d on and ends with [78]\d%", out)


def test_the_parts_of_an_answer_add_up(run, demo_folder):
    code, out, err = run("attribute", str(demo_folder), CAPITAL, "--target", PARIS, "--dtype", "float32")
    assert (code, err) == (0, "")
    pattern = r"␣Paris: logit (\S+) = (\S+) \(sum of the parts\) (\S+) \(rounding\)"
    logit, total, rounding = map(float, re.search(pattern, out).groups())
    assert logit == pytest.approx(total, abs=0.002) and abs(rounding) < 1e-3
    assert re.search(r"^ 29 +[+-]\d+\.\d\d +[+-]\d+\.\d\d +\+1\d\.\d\d  █+ *$", out, re.MULTILINE)
    assert re.search(r"^ layer 23 head 4 +\+2\.\d\d  █+ *$", out, re.MULTILINE)


def test_one_head_carries_the_country_to_the_end(run, demo_folder):
    words = ("patch", str(demo_folder), CAPITAL, ITALY, "--target", PARIS, "--other", ROME, "--over", "layer,head")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert re.search(r"clean: .*France.*\n +logit of ␣Paris above ␣Rome: \d", out)
    assert re.search(r"corrupted: .*Italy.*\n +logit of ␣Paris above ␣Rome: -\d", out)
    assert re.search(r"^ *23( +-?\d+){4} +[789]\d( +-?\d+){4} *$", out, re.MULTILINE)
    assert re.search(r"Most: layer 23, head 4 [789]\d%", out)


def test_where_heads_look_in_the_real_model(run, demo_folder):
    code, out, err = run("attention", str(demo_folder), CAPITAL)
    assert (code, err) == (0, "")
    rows = re.findall(r"^ (\d+) +" + r" +".join([r"\d\.\d\d \(h\d (\d\.\d\d)\)"] * 4), out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(30))
    assert max(float(row[3]) for row in rows) > 0.5, "no induction head"
    code, out, _ = run("attention", str(demo_folder), "한 🙂", "--layer=17", "--head", "3")
    assert code == 0 and "<0xED><0x95>@1" in out and "␣🙂@3" in out
    assert len(re.findall(r"@\d+ +\S.*@0 \d+(\.\d)?%", out)) >= 4


def test_the_stream_of_the_real_model_grows_and_its_first_token_most(run, demo_folder):
    code, out, err = run("norms", str(demo_folder), CAPITAL)
    assert (code, err) == (0, "")
    rows = re.findall(r"^ (embedding|layer \d+) +([\d.]+) +[\d.]+ +-?[\d.]+ +([\d.]+) ", out, re.MULTILINE)
    assert len(rows) == 31 and float(rows[25][1]) > 20 * float(rows[25][2]) > 20 * float(rows[1][2])


def test_what_a_text_loses_without_each_layer_and_unit(run, tiny):
    code, out, err = run("ablate", tiny, "abab", "--over", "layers", "--edit", "zero")
    assert (code, err) == (0, "")
    rows = re.findall(r"^ layer (\d) +(\d+\.\d\d) +([+-]\d+\.\d\d)", out, re.MULTILINE)
    whole = float(re.search(r"whole model: (\d+\.\d\d)", out)[1])
    assert len(rows) == 2 and all(float(loss) - whole == pytest.approx(float(change), abs=0.011) for _, loss, change in rows)
    found = parsed(run("ablate", tiny, "abab", "--over", "units", "--json")[1])
    changes = [part["change"] for part in found["parts"]]
    assert len(changes) == 32 and changes == sorted(changes, reverse=True)
    assert found["loss"] == pytest.approx(whole, abs=0.006) and found["parts"][0]["name"].startswith("layers.")
    assert run("ablate", tiny, "", "--over", "heads")[2].count("prompt is empty") == 1


def test_what_many_texts_lose_has_a_standard_error(run, tiny, tmp_path):
    texts = ["abab", "the first", "bbbbbb"]
    lines, objects = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    lines.write_text("\n\n".join(texts))
    objects.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    options = ("--over", "layers", "--edit", "zero")
    each = [parsed(run("ablate", tiny, text, *options, "--json")[1]) for text in texts]
    found = parsed(run("ablate", tiny, "--texts", str(objects), *options, "--json")[1])
    assert (found["texts"], found["tokens"]) == (3, None)
    errors = {}
    for part in found["parts"]:
        own = [next(other for other in text["parts"] if other["name"] == part["name"]) for text in each]
        changes = [other["change"] for other in own]
        assert part["change"] == pytest.approx(statistics.mean(changes), abs=1e-5)
        assert part["standard_error"] == pytest.approx(statistics.stdev(changes) / 3**0.5, abs=1e-5)
        assert {other["standard_error"] for other in own} == {None}
        errors[part["name"]] = part["standard_error"]
    code, out, err = run("ablate", tiny, "--texts", str(lines), *options)
    assert (code, err) == (0, "") and out.startswith("3 texts of 22 tokens")
    shown = re.findall(r"^ layer (\d) +\d+\.\d\d +[+-]\d+\.\d\d +(\d+\.\d\d)", out, re.MULTILINE)
    assert len(shown) == 2 and all(float(error) == pytest.approx(errors[f"layers.{i}"], abs=0.006) for i, error in shown)


def test_texts_to_ablate_that_are_not_there(run, tiny, tmp_path):
    (tmp_path / "one.txt").write_text("abab\n")
    assert "missing PROMPT or --texts" in run("ablate", tiny)[2]
    assert "PROMPT and --texts are given" in run("ablate", tiny, "a", "--texts", str(tmp_path / "one.txt"))[2]
    assert "cannot read" in run("ablate", tiny, "--texts", str(tmp_path / "none.txt"))[2]


def test_what_four_bits_cost_each_matrix_and_how_many_directions_it_has(run, demo_folder):
    code, out, err = run("spectra", str(demo_folder), "--matrices", "layers.[03].attention.w[qk].weight")
    assert (code, err) == (0, "")
    found = re.findall(r"^ layers\.([03])\.attention\.w([qk])\.weight +\d+×576 +[\d.]+ +([\d.]+) +([\d.]+)", out, re.MULTILINE)
    assert len(found) == 4 and all(1 < float(stable) < float(effective) < 576 for _, _, stable, effective in found)
    code, out, _ = run("spectra", str(demo_folder), "--matrices", "layers.0.feed_forward.*", "--to", "int4:group=32", "--json")
    matrices = parsed(out)["matrices"]
    assert code == 0 and len(matrices) == 3 and all(0 < matrix["relative"] < 0.15 for matrix in matrices)


# ---- JSON


def test_the_lens_as_json_has_all_points_and_positions(run, tiny):
    code, out, err = run("lens", tiny, " a\n", "--target", "b", "--top", "2", "--json")
    assert (code, err) == (0, "")
    found = parsed(out)
    assert [token["text"] for token in found["tokens"]] == ["<|begin_of_text|>", "␣", "a", "\\n"]
    assert [token["id"] for token in found["tokens"]] == [256, 32, 97, 10]
    assert found["target"] == {"id": 98, "text": "b"}
    names = ["embedding", *(f"layers.{i}.residual_{part}" for i in (0, 1) for part in ("mid", "post"))]
    assert [point["point"] for point in found["points"]] == names
    assert all([at["position"] for at in point["positions"]] == [0, 1, 2, 3] for point in found["points"])
    last = found["points"][-1]["positions"][-1]
    assert last["kl"] == 0 and 0 < last["target_probability"] < 1 and 1 <= last["target_rank"] <= 512
    assert len(last["top"]) == 2 and last["top"][0]["probability"] >= last["top"][1]["probability"]
    assert parsed(run("lens", tiny, "x", "--json")[1])["target"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("lens", "a<|eot_id|>"),
        ("attention", "a<|eot_id|>"),
        ("attribute", "a<|eot_id|>", "--target", "b"),
        ("norms", "a<|eot_id|>"),
        ("patch", "a<|eot_id|>", "b<|eot_id|>", "--target", "c"),
    ],
    ids=lambda words: words[0],
)
def test_special_tokens_are_read_on_request(run, tiny, words):
    command, *rest = words
    code, out, err = run(command, tiny, *rest, "--special_tokens", "--json")
    assert (code, err) == (0, "")
    assert "<|eot_id|>" in out
    code, out, err = run(command, tiny, *rest, "--json")
    assert code == 0 and "<|eot_id|>" not in out and "--special_tokens" in err


def test_attention_as_json_has_every_head_or_the_whole_pattern(run, tiny):
    found = parsed(run("attention", tiny, "abc", "--json")[1])
    assert [(layer["layer"], len(layer["heads"])) for layer in found["layers"]] == [(0, 4), (1, 4)]
    assert found["layers"][1]["heads"][2].keys() == {"head", "sink", "previous", "induction", "entropy"}
    assert [layer["layer"] for layer in parsed(run("attention", tiny, "abc", "--layer", "1", "-j")[1])["layers"]] == [1]
    found = parsed(run("attention", tiny, "abc", "--layer", "-1", "--head", "0", "--json")[1])
    assert (found["layer"], found["head"]) == (1, 0)
    assert [sum(row) for row in found["pattern"]] == pytest.approx([1] * 4)
    assert found["pattern"][0] == [1, 0, 0, 0]


def test_attribution_as_json_has_every_part(run, tiny):
    code, out, err = run("attribute", tiny, "42", "--target", "7", "--other", "1", "--json", "--dtype", "float32")
    assert (code, err) == (0, "")
    found = parsed(out)
    assert (found["target"]["text"], found["other"]["text"], found["position"]) == ("7", "1", 2)
    parts = [found["embedding"], *(part for layer in found["layers"] for part in (*layer["heads"], layer["ffn"]))]
    assert len(parts) == 1 + 2 * 5
    assert sum(parts) == pytest.approx(found["total"]) == pytest.approx(found["logit"], abs=1e-5)


@pytest.mark.parametrize(("over", "axis", "n"), [("layer,position", "position", 3), ("layer, head", "head", 4)])
def test_a_grid_as_json_has_its_labels(run, tiny, over, axis, n):
    code, out, _ = run("patch", tiny, "12", "13", "--target", "x", "--over", over, "--json")
    found = parsed(out)
    assert code == 0 and found["metric"] == "probability of x" and found["target"]["id"] == ord("x")
    assert [a["name"] for a in found["axes"]] == ["layer", axis]
    assert [len(row) for row in found["values"]] == [n, n]
    assert [token["text"] for token in found["corrupted_tokens"]] == ["<|begin_of_text|>", "1", "3"]


def test_an_estimate_is_shown_beside_the_exact_grid(run, tiny):
    words = ("patch", tiny, "12", "13", "--target", "x", "--other", "y")
    exact, both, estimate = (parsed(run(*words, "--by", by, "--json")[1]) for by in ("exact", "both", "gradient"))
    assert both["values"] == exact["values"] != estimate["values"] == both["estimate"]["values"]
    assert (exact["by"], both["by"], estimate["by"]) == ("exact", "exact", "gradient")
    differences = torch.tensor(exact["values"]) - torch.tensor(estimate["values"])
    assert both["estimate"]["largest_difference"] == pytest.approx(differences.abs().max().item(), rel=1e-4)
    code, out, err = run(*words, "--by", "both", "--steps", "4")
    assert (code, err) == (0, "") and out.count("Most: layer") == 2
    assert re.search(r"Exact:.*By the gradient:.*correlation -?\d\.\d\d, largest difference \d+%", out, re.DOTALL)


def test_an_estimate_of_one_token_is_of_its_log_probability(run, demo_folder):
    """The gradient of its probability, which is 0.000 in the corrupted text, is 0 in every cell."""
    words = ("patch", str(demo_folder), CAPITAL, ITALY, "--target", PARIS, "--dtype", "float32", "--json")
    found = parsed(run(*words, "--by", "gradient")[1])
    assert found["metric"] == "log-probability of ␣Paris" and found["corrupted"] < found["clean"] - 2 < 0
    restored = (torch.tensor(found["values"]) - found["corrupted"]) / (found["clean"] - found["corrupted"])
    assert restored[15].argmax() == 4 and restored[15, 4] > 0.5, "Italy's residual stream, in the middle of the model"


def test_positions_of_heads_are_ranked(run, tiny, tmp_path):
    words = ("patch", tiny, "12", "13", "--target", "x", "--over", "layer,position,head")
    assert len(parsed(run(*words, "--json")[1])["values"][0][0]) == 4
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    found = re.findall(r"layer [01], \S+@\d, head [0-3] -?\d+%", " ".join(out.split()))
    assert len(found) == 12
    page = tmp_path / "heads.html"
    assert run(*words, "--out", str(page)) == (0, out, f"wrote {page}: open it in a browser\n")
    assert '"axes":["layer","position","head"]' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "3"), "--steps is given, but --by is exact"),
        (("--by", "gradient", "--steps", "0"), "--steps is 0, expected a whole number from 1; leave it out for one gradient"),
        (("--by", "x"), "exact"),
        (("--noise_seeds", "3"), "--noise_seeds is given without --noise"),
        (("--noise_scale", "1"), "without --noise"),
    ],
)
def test_estimates_that_cannot_be_are_refused(run, tiny, words, message):
    code, out, err = run("patch", tiny, "12", "13", "--target", "x", *words)
    assert (code, out) == (2, "") and message in err


def test_the_stream_as_json_has_every_point_and_token(run, tiny):
    found = parsed(run("norms", tiny, "ab", "--json")[1])
    assert [point["point"] for point in found["points"]][::2] == [
        "embedding",
        "layers.0.residual_post",
        "layers.1.residual_post",
    ]
    assert all(len(point[measure]) == 3 for point in found["points"] for measure in ("norm", "drift", "to_last"))


def test_waves_are_read_without_weights(run, tmp_path, tiny):
    params = json.loads((Path(tiny) / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    (tmp_path / "consolidated.00.pth").write_bytes(b"no weights at all")
    pairs = parsed(run("rope", str(tmp_path), "--json")[1])["pairs"]
    assert len(pairs) == params["dim"] // params["n_heads"] // 2
    assert pairs[0]["slowed"] == 1 and pairs[0]["frequency"] == 1
    code, out, err = run("rope", str(tmp_path))
    assert (code, err) == (0, "") and re.search(r"^ 0 +1 +6\.3 +6\.3 +1\.00×", out, re.MULTILINE)


def test_texts_that_do_not_differ_have_nothing_to_bring_back(run, tiny):
    code, out, _ = run("patch", tiny, "same", "same", "--target", "x")
    assert code == 0 and "no difference to restore" in out


# ---- what is shown


def on_a_terminal(warm: Path, columns: int, *words: str) -> list[str]:
    """Run a command on a terminal of a given width; return what it prints."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "dumb"}
    with subprocess.Popen([warm / "llama-ref", *words], stdout=follower, stderr=subprocess.PIPE, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while part := os.read(leader, 1 << 16):
                written += part
        except OSError:  # Linux: the other end is closed
            pass
        errors = process.stderr.read()
    os.close(leader)
    assert process.returncode == 0, errors
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).replace("\r", "").split("\n")


def test_a_lens_fits_a_terminal_of_80_columns(warm, tiny):
    lines = on_a_terminal(warm, 80, "lens", tiny, "a long prompt", "--target", "z", "--top", "20")
    assert max(map(len, lines)) <= 80
    (head,) = (line for line in lines if line.startswith(" after"))
    assert head.split() == ["after", "z", "rank", "entropy", "KL", "likeliest", "next"]
    rows = [line for line in lines if line.startswith((" embedding", " layer"))]
    assert len(rows) == 3 and all("…" in row and re.search(r" \d\.\d\d ", row) for row in rows)


def test_a_grid_goes_on_below_where_a_line_ends(warm, tiny):
    lines = on_a_terminal(warm, 80, "patch", tiny, "0123456789abc", "0123456789abd", "--target", "z")
    assert max(map(len, lines)) <= 80
    heads = [re.findall(r"@(\d+)", line) for line in lines if re.match(r" *layer +@", line)]
    assert len(heads) == 2 and [int(head) for part in heads for head in part] == list(range(14))
    assert sum(bool(re.match(r" *[01]( +-?\d+)+ *$", line)) for line in lines) == 4


def test_text_from_a_model_is_no_markup_and_no_command_of_the_terminal(run, tiny):
    code, out, _ = run("lens", tiny, "[bold]\x1b[31m\x00:smile:", "--target", "[")
    assert code == 0 and "\x1b" not in out and "\x00" not in out
    assert "[│b│o│l│d│]│\\x1b│[│3│1│m│\\x00│:│s│m│i│l│e│:" in out and re.search(r"after +\[ +rank", out)


def test_of_a_target_of_several_tokens_the_first_is_taken(run, tiny):
    code, out, err = run("attribute", tiny, "x", "--target", "42")
    assert code == 0 and out.count("4: logit") == 1
    assert err == "--target is 2 tokens, 4│2: only the first, 4, is used\n"
    assert (
        "--other is 3 tokens, <0xED>│<0x95>│<0x9C>: only the first, <0xED>"
        in run("attribute", tiny, "x", "--target", "4", "--other", "한")[2]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lens", "The opposite of hot is", "--target", "cold"), {"target": (" cold", "cold")}),
        (("attribute", CAPITAL, "--target", "Paris", "--other", " Rome"), {"target": (" Paris", "Paris")}),
        (("patch", CAPITAL, ITALY, "--target", PARIS, "--other", "Rome", "--by", "gradient"), {"other": (" Rome", "Rome")}),
        (("lens", "The opposite of hot is", "--target", ","), {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_missing_space_is_told(run, demo_folder, words, said):
    command, *rest = words
    code, _, err = run(command, str(demo_folder), *rest)
    line = r'--{0} is "{2}", whose first token has probability \S+; that of "{1}" has [678]\d%: did you mean --{0} "{1}"\?\n'
    lines = [line.format(name, *spellings) for name, spellings in said.items()]
    assert code == 0 and re.fullmatch("".join(lines), err)


# ---- images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> str:
    """A checkpoint of four layers and two cross-attention layers, which reads images; each token is a byte."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = byte_tokenizer(folder / "bytes.model")
    return str(make_random_checkpoint(folder / "Seeing", PARAMS, tokenizer=tokenizer, dtype=torch.float32))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture(100, 50).save(path)
    return str(path)


def test_attention_shows_where_in_an_image_each_token_looks(run, seeing, photo):
    code, out, err = run("attention", seeing, "ab", "--image", photo)
    assert (code, err) == (
        0,
        "encoding an image of 2 tiles\n",
    ) and "image of 100 × 50 pixels; mean over the cross-attention layers" in out
    rows = re.findall(
        r"^ (\S+)@(\d) +[\d.]+% +[\d.]+%  (?:\(\d+, \d+\) [\d.]+%  ){3}\(\d+, \d+\) [\d.]+% *$", out, re.MULTILINE
    )
    assert rows == [("<|image|>", "1"), ("a", "2"), ("b", "3")]
    chosen = run("attention", seeing, "ab", "--image", photo, "--layer", "-1", "--head", "0")[1]
    assert "cross-attention layer 1, head 0" in chosen


def test_attention_to_an_image_as_json_has_every_patch(run, seeing, photo):
    found = parsed(run("attention", seeing, "ab", "--image", photo, "--json")[1])
    assert [token["text"] for token in found["tokens"]] == ["<|begin_of_text|>", "<|image|>", "a", "b"]
    assert found["image"] == {"width": 100, "height": 50, "patch_width": 14, "patch_height": 14} and found["head"] is None
    assert [(layer["layer"], layer["before"]) for layer in found["layers"]] == [(0, 1), (1, 3)]
    for layer in found["layers"]:
        patches = torch.tensor(layer["patches"])
        assert patches.shape == (4, 4, 8)
        total = patches.sum((1, 2)) + torch.tensor(layer["class"]) + torch.tensor(layer["beside"])
        torch.testing.assert_close(total, torch.tensor([0, 1, 1, 1.0]))
    only = parsed(run("attention", seeing, "ab", "--image", photo, "--json", "--layer", "1", "--head", "2")[1])
    assert [layer["layer"] for layer in only["layers"]] == [1] and only["head"] == 2


def test_an_image_stands_where_special_tokens_say(run, seeing, photo):
    words = ("attention", seeing, "a<|image|>b", "--image", photo)
    found = parsed(run(*words, "--special_tokens", "--json")[1])
    assert [token["text"] for token in found["tokens"]] == ["<|begin_of_text|>", "a", "<|image|>", "b"]
    found = parsed(run(*words, "--json")[1])
    assert [token["text"] for token in found["tokens"]][:3] == ["<|begin_of_text|>", "<|image|>", "a"]
    code, _, err = run("attention", seeing, "<|image|><|image|>", "--image", photo, "--special_tokens")
    assert code == 2 and "the prompt has <|image|> 2 times, expected one place for the image" in err


def test_pictures_of_attention_to_an_image(run, seeing, photo, tmp_path):
    words = ("attention", seeing, "ab", "--image", photo, "--json")
    assert run(*words, "--png", str(tmp_path)) == run(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-layers.png", "image.png"]


def test_the_lens_shows_an_image_to_the_model(run, seeing, photo, tmp_path):
    words = ("lens", seeing, "ab", "--target", "c")
    code, shown, err = run(*words, "--image", photo, "--out", str(tmp_path / "a.html"), "--png", str(tmp_path / "png"))
    assert err.count("encoding an image") == 1
    assert code == 0 and shown.startswith("<|begin_of_text|>│<|image|>│a│b\n") and shown != run(*words)[1]
    assert '"image":{"width":100,"height":50' in (tmp_path / "a.html").read_text(encoding="utf-8")
    names = ("attention", "attribution", "image", "image-layers", "lens", "norms", "pattern", "target")
    assert sorted(path.stem for path in (tmp_path / "png").iterdir()) == list(names)


def test_an_image_that_makes_no_sense_is_told_before_the_weights_are_read(run, seeing, tiny, photo, tmp_path):
    (tmp_path / "params.json").write_bytes((Path(seeing) / "params.json").read_bytes())
    (tmp_path / "consolidated.00.pth").write_bytes(b"no weights at all")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    for folder, image, words, message in (
        (tiny, photo, (), "--image is given, but this model reads no images; use a vision release"),
        (tmp_path, "/nowhere.png", (), "cannot read the image: .*nowhere.png"),
        (tmp_path, str(empty), (), "empty.png"),
        (tmp_path, photo, ("--layer", "2"), "--layer is 2, expected a whole number from 0 to 1"),
        (tmp_path, photo, ("--head", "4"), "--head is 4, expected a whole number from 0 to 3"),
    ):
        code, out, err = run("attention", str(folder), "x", "--image", image, *words)
        assert (code, out) == (2, "") and re.match(f"llama-ref: .*{message}", err)


# ---- files


def test_a_report_and_pictures_are_written_and_the_table_is_shown_all_the_same(run, tiny, tmp_path):
    words = ("lens", tiny, "<b>한</b>", "--target", "z")
    code, shown, _ = run(*words)
    page, folder = tmp_path / "a.html", tmp_path / "new" / "png"
    told = f"wrote {page}: open it in a browser\nwrote pictures into {folder}\n"
    assert run(*words, "--out", str(page), "--png", str(folder)) == (code, shown, told)
    page = page.read_text(encoding="utf-8")
    assert '"model":"Tiny"' in page and '"target":122,' in page and "<b>" not in page
    pictures = {path.name: path.read_bytes()[:4] for path in folder.iterdir()}
    names = ("attention", "attribution", "lens", "norms", "pattern", "target")
    assert pictures == {f"{name}.png": b"\x89PNG" for name in names}


def test_without_matplotlib_the_report_and_the_table_come_before_the_error(run, tiny, tmp_path, monkeypatch):
    words, page = ("lens", tiny, "x", "--target", "z"), tmp_path / "a.html"
    shown = run(*words)[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run(*words, "--out", str(page), "--png", str(tmp_path / "png"))
    assert (code, out) == (2, shown) and page.exists()
    assert re.fullmatch("wrote .*a.html: .*\nllama-ref: --png needs matplotlib, which is not installed: .*\n", err)
    code, out, err = run(*words, "--png", str(tmp_path / "png"))
    assert (code, out) == (2, "") and err.startswith("llama-ref: --png needs matplotlib")


@pytest.mark.parametrize(
    ("words", "picture"),
    [
        (("attention", "{}", "abc"), "attention"),
        (("attention", "{}", "abc", "--layer", "1", "--head", "2"), "pattern"),
        (("attribute", "{}", "abc", "--target", "d"), "attribution"),
        (("patch", "{}", "ab", "ac", "--target", "d", "--over", "layer,head"), "patch"),
        (("patch", "{}", "ab", "ac", "--target", "d", "--over", "layer,position,head"), "patch"),
        (("norms", "{}", "abc"), "norms"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_other_commands_draw_what_they_show(run, tiny, tmp_path, words, picture):
    words = [word.format(tiny) for word in words]
    assert run(*words, "--png", str(tmp_path), "--json") == run(*words, "--json")
    assert [path.name for path in tmp_path.iterdir()] == [f"{picture}.png"]


def test_where_nothing_can_be_written_is_told_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "file").write_text("")
    for words, message in (
        (("--out", str(tmp_path / "no" / "a.html")), "there is no folder"),
        (("--out", str(tmp_path / "a.pdf")), r"expected a file that ends in .html or .htm"),
        (("--png", str(tmp_path / "file")), "which is a file, expected a folder for pictures"),
    ):
        code, out, err = run("lens", "nowhere-at-all", "x", *words)
        assert (code, out) == (2, "") and re.fullmatch(f"llama-ref: --(out|png) is .*{message}.*\n", err)


# ---- misuse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lens", "{}", ""), "prompt is empty, expected a text such as"),
        (("lens", "{}", "x", "--target", ""), r'target is empty, expected a text such as " Paris"'),
        (("attribute", "{}", "", "--target", "x"), "prompt is empty"),
        (("patch", "{}", "a", "", "--target", "x"), "corrupted is empty"),
        (("lens", "{}", "12345", "--max_seq_len", "5"), "the prompt has 6 tokens, but max_seq_len is 5: shorten it"),
        (("patch", "{}", "1", "12345", "--target", "x", "--max_seq_len", "5"), "the corrupted has 6 tokens, but"),
        (("lens", "{}", "x", "--top", "0"), "top is 0, expected a whole number from 1 to 512"),
        (("lens", "{}", "x", "--top", "many"), "top is 'many', expected"),
        (("attention", "{}", "x", "--layer", "2"), "--layer is 2, expected a whole number from 0 to 1"),
        (("spectra", "{}", "--matrices", "layers.40.*"), "no matrix is called .*, and the model has layers 0 to 1"),
        (("attention", "{}", "x", "--layer", "1.5"), "--layer is '1.5', expected a whole number"),
        (("attention", "{}", "x", "--layer", "0", "--head", "4"), "--head is 4, expected a whole number from 0 to 3"),
        (("attention", "{}", "x", "--head", "1"), "--head 1 needs --layer"),
        (("patch", "{}", "ab", "abc", "--target", "x"), r"clean has 3 tokens, .*│a│b, but corrupted has 4, .* reword one so"),
        (("patch", "{}", "a", "b", "--target", "x", "--over", "head"), "over is 'head', expected layer,position or layer,head"),
        (("norms", "{}", ""), "prompt is empty"),
        (("spectra", "{}", "--matrices", "zz*"), "no matrix is called 'zz\\*'"),
        (("spectra", "{}", "--to", "int3"), "--to is 'int3', expected"),
        (("lens", "{}", "x", "--png"), "--png needs a value: --png FOLDER"),
        (("lens", "{}", "x", "--target", "--json"), "--target needs a value: --target TEXT"),
        (("rope", "nowhere-at-all"), "no checkpoint at nowhere-at-all"),
        (("lens", "{}", "x", "--compile"), "unknown flag --compile"),
        (("lens", "{}", "x", "--quantize", "int3"), "quantize is 'int3'"),
        (("lens", "{}", "x", "--device", "gpu"), "unknown device gpu"),
        (("lens", "nowhere-at-all", "x"), "nowhere-at-all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_a_line_and_2(run, tiny, words, message):
    code, out, err = run(*(word.format(tiny) for word in words))
    assert (code, out) == (2, "")
    assert re.match(f"llama-ref: .*{message}", err) and err.count("\n") == 1


def test_a_layer_that_is_not_there_is_told_before_the_weights_are_read(run, tmp_path, tiny):
    (tmp_path / "params.json").write_bytes((Path(tiny) / "params.json").read_bytes())
    (tmp_path / "consolidated.00.pth").write_bytes(b"no weights at all")
    for words, message in (
        (("--layer", "40"), "--layer is 40, expected .* 0 to 1"),
        (("--layer", "1", "--head=9"), "--head is 9, expected .* 0 to 3"),
    ):
        code, out, err = run("attention", str(tmp_path), "x", *words)
        assert (code, out) == (2, "") and re.search(message, err)


@pytest.mark.parametrize(
    "words", [("lens", "x"), ("attribute", "x", "y"), ("patch", "x", "y", "--target", "z"), ("lens", "x", "y", "z")]
)
def test_words_that_are_missing_or_too_many_are_misuse(run, words):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and re.match("llama-ref: (missing|unexpected) .*\n$", err)


@pytest.mark.parametrize("command", ["lens", "attention", "attribute", "patch", "norms", "ablate"])
def test_several_processes_are_refused(run, tiny, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {"patch": ("y", "--target", "z"), "attribute": ("--target", "z")}.get(command, ())
    code, out, err = run(command, tiny, "x", *words)
    assert (code, out) == (2, "") and "2 processes: a study needs the whole model in one" in err


def test_weights_that_are_not_finite_end_in_no_traceback(run, tiny, tmp_path):
    folder = tmp_path / "NaN"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        if file.name != "consolidated.00.pth":
            (folder / file.name).symlink_to(file)
    state = torch.load(Path(tiny) / "consolidated.00.pth", weights_only=True)
    state["layers.1.attention.wo.weight"][:] = torch.nan
    torch.save(state, folder / "consolidated.00.pth")
    here = (str(folder), "x", "--target", "z", "--verify", "never")
    code, out, _ = run("lens", *here, "--json")
    last = parsed(out)["points"][-1]["positions"][0]
    assert code == 0 and last["target_probability"] is last["target_rank"] is last["kl"] is None
    assert run("lens", *here)[0] == run("attention", str(folder), "x", "--verify", "never")[0] == 0
    assert run("lens", *here, "--out", str(tmp_path / "a.html"), "--png", str(tmp_path / "png"))[0] == 0
    assert not (tmp_path / "png" / "attribution.png").exists() and (tmp_path / "a.html").exists()
    code, out, err = run("spectra", str(folder), "--verify", "never", "--matrices", "layers.1.attention.*", "--json")
    found = {matrix["matrix"]: matrix["values"][0] for matrix in parsed(out)["matrices"]}
    assert code == 0 and [name for name, value in found.items() if value is None] == ["layers.1.attention.wo.weight"]
    code, out, err = run("attribute", *here)
    assert (code, out) == (1, "") and "the parts add up to nan" in err
    code, out, _ = run("patch", str(folder), "x", "y", *here[2:])
    assert code == 0 and "nothing to compare" in out
