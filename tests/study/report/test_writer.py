"""The report's file: it has the study's numbers, no text becomes markup, and it is written atomically."""

import base64
import errno
import gc
import hashlib
import importlib
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import REPOSITORY, parsed
from folders import byte_tokenizer, tiny_folder
from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.quantization.apply import quantize_model
from llama_ref.study.analyses.attention import attention_pattern, summarize_attention
from llama_ref.study.analyses.attribution import attribute
from llama_ref.study.analyses.logit_lens import logit_lens, predict, residual_points
from llama_ref.study.analyses.overview import MOST_TOKENS, overview
from llama_ref.study.analyses.residual import residual_stream
from llama_ref.study.report import packing, writer
from llama_ref.study.report.image_packing import pack_image
from llama_ref.study.report.packing import PackedPatterns, how_many_kept, pack
from llama_ref.study.report.writer import check_report, write_report
from llama_ref.study.vision.image_attention import ImageAttention
from llama_ref.tokenizer import Tokenizer
from study.pictured import IMAGE, picture, random_vision_model

lens = importlib.import_module("llama_ref.study.analyses.logit_lens")  # the package has a function of that name

TOKENS = [256, 84, 104, 101, 32, 99, 97, 116, 32, 84]
SOURCES = sorted((REPOSITORY / "llama_ref" / "study" / "report" / "page").iterdir())
ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>-->\u2028\u2029 &lt;&amp;",
    "{{data}}{{script}}{{patterns}}",
    "<img src=x onerror=alert(1)>\\u003c'\"`${alert(1)}",
    "\0\x1b[31m\ud800\u202e",
]


def random_model(**shape: int) -> Transformer:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "multiple_of": 32, "norm_eps": 1e-5} | shape
    torch.manual_seed(0)
    model = Transformer(ModelArgs.from_dict(sizes | {"rope_theta": 5e5}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=3 * parameter.shape[1] ** -0.5)
    return model


@dataclass
class Page(HTMLParser):
    """Parse a page as a browser does."""

    text: str
    tags: list[str] = field(default_factory=list)
    scripts: list[tuple[dict[str, str | None], str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    policy: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        assert not any(name.startswith("on") or name in ("style", "src") for name in found)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag == "script":
            self.scripts.append((found, ""))
        if tag == "style":
            self.styles.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.cdata_elem:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        if self.tags and self.tags[-1] == "style" and self.cdata_elem:
            self.styles[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        return parsed(text)


def written(llama: Llama, tokens: list[int], folder: Path, model_name: str = "Tiny", **options: Any) -> Page:
    found = overview(llama.model, tokens, bos=256, ids=range(256), **options)
    write_report(found, llama.tokenizer, folder / "report.html", model_name=model_name)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.double(), rtol=1e-4, atol=1e-12)


# ---- predictions


@pytest.mark.parametrize("logits_at_a_time", [lens.LOGITS_AT_A_TIME, 3 * 512, 1])
def test_every_token_has_what_the_logits_before_it_gave_it(peaked, monkeypatch, logits_at_a_time):
    monkeypatch.setattr(lens, "LOGITS_AT_A_TIME", logits_at_a_time)
    found = predict(peaked.model, TOKENS, top=3)
    expected = peaked.model(torch.tensor([TOKENS]))[0].softmax(-1)  # (T, V)
    ordered = expected.sort(dim=-1, descending=True)
    torch.testing.assert_close(found.top_probabilities, ordered.values[:, :3])
    assert torch.equal(found.top_ids, ordered.indices[:, :3])
    assert found.probability[0].isnan() and found.rank[0] == 0
    for t in range(1, len(TOKENS)):
        assert found.probability[t].item() == pytest.approx(expected[t - 1, TOKENS[t]].item(), rel=1e-5)
        assert ordered.indices[t - 1, found.rank[t] - 1] == TOKENS[t]
    assert found.tokens == TOKENS


# ---- patterns

HALVES = {"rtol": 2**-11, "atol": 2**-25}  # half a step of float16, and of its smallest numbers


def test_shares_keep_their_digits_and_their_order(peaked):
    shares = [0.952, 0.022, 0.011, 0.00652, 0.00651, 0.00601, 0.0013, 3e-6, 0.0]
    pattern = torch.zeros(1, 9, 9)
    pattern[0, :, :] = torch.tensor(shares)
    unpacked = PackedPatterns(9, 9, [pack(pattern, 9)]).unpack(0, 0)[4].tolist()
    assert [f"{share:.2e}" for share in unpacked[:6]] == [f"{share:.2e}" for share in shares[:6]]
    assert unpacked == sorted(unpacked, reverse=True) and len(set(unpacked)) == 9


def test_short_patterns_are_whole_but_for_rounding(peaked):
    found = overview(peaked.model, TOKENS).patterns
    assert found.kept == len(TOKENS)
    for layer in range(2):
        for head in range(4):
            expected = attention_pattern(peaked.model, TOKENS, layer, head)
            torch.testing.assert_close(found.unpack(layer, head), expected, **HALVES)


def test_of_long_patterns_the_largest_shares_are_kept(monkeypatch):
    model, tokens = random_model(), list(range(100))
    monkeypatch.setattr(packing, "KEPT_PER_HEAD", 1000)
    found = overview(model, tokens).patterns
    assert found.kept == 10
    for layer, head in ((0, 1), (1, 3)):
        expected, unpacked = attention_pattern(model, tokens, layer, head), found.unpack(layer, head)
        best = expected.topk(10, dim=-1)
        torch.testing.assert_close(unpacked.gather(-1, best.indices), best.values, **HALVES)
        assert (unpacked > 0).sum(-1).max() == 10
        torch.testing.assert_close(unpacked.topk(10, dim=-1).values, best.values, **HALVES)


@pytest.mark.parametrize("n_tokens", [1, 2, 8, 74, 75, 500, 2048])
def test_a_head_keeps_no_more_than_there_is_room_for(n_tokens):
    kept = how_many_kept(n_tokens)
    assert 1 <= kept <= n_tokens
    assert kept == min(n_tokens, 8) or kept * n_tokens <= packing.KEPT_PER_HEAD


@pytest.mark.parametrize("sharpness", [0.1, 2.5, 10])
def test_whatever_heads_do_500_tokens_of_a_1b_are_10_mb(sharpness):
    torch.manual_seed(0)
    scores = torch.randn(4, 500, 500) * sharpness
    pattern = scores.masked_fill(~torch.ones(500, 500, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    packed = pack(pattern, how_many_kept(500))
    assert 16 * 32 * sum(len(base64.b64encode(head)) for head in packed) / 4 < 10e6


def test_a_page_of_many_heads_stays_small_and_holds_one_layers_patterns_at_a_time(peaked, tmp_path, monkeypatch):
    model = random_model(n_layers=4, n_heads=32, n_kv_heads=8, dim=128)
    T, alive = 500, []

    def spy(pattern: Tensor, kept: int) -> list[bytes]:
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.numel() == 32 * T * T]
        alive.append(len({tensor.untyped_storage().data_ptr() for tensor in tensors}))
        return pack(pattern, kept)

    monkeypatch.setattr(sys.modules["llama_ref.study.analyses.overview"], "pack", spy)
    found = overview(model, [i * 7 % 512 for i in range(T)])
    write_report(found, peaked.tokenizer, tmp_path / "report.html", model_name="Many")
    assert (tmp_path / "report.html").stat().st_size * (16 / 4) < 12e6  # as many heads as in a 1B
    assert len(alive) == 4 and max(alive) <= 3  # the layer's scores, their softmax, the argument of `see`


# ---- the numbers


def test_the_page_has_the_lenses_own_numbers(peaked, tmp_path):
    model, target = peaked.model, 101
    data = written(peaked, TOKENS, tmp_path, target=target, top=3).data
    assert (data["tokens"], data["target"], data["model"], data["dtype"]) == (TOKENS, target, "Tiny", "float32")
    predictions = predict(model, TOKENS, top=3)
    assert data["predictions"]["probability"][0] is None and data["predictions"]["rank"][0] is None
    close(data["predictions"]["probability"][1:], predictions.probability[1:])
    assert data["predictions"]["rank"][1:] == predictions.rank[1:].tolist()
    ends = ["embedding", "layers.0.residual_post", "layers.1.residual_post"]
    read = logit_lens(model, TOKENS, target=target, top=3, points=ends)
    for name in ("top_probabilities", "entropy", "kl", "target_probability"):
        close(data["lens"][name], getattr(read, name))
    assert data["lens"]["top_ids"] == read.top_ids.tolist() and data["lens"]["target_rank"] == read.target_rank.tolist()
    habits = summarize_attention(model, TOKENS, bos=256, ids=range(256))
    for name, values in data["attention"].items():
        close(values, getattr(habits, name))
    shares = attribute(model, TOKENS, target)
    close(data["attribution"]["heads"], shares.heads)
    close(data["attribution"]["ffns"], shares.ffns)
    for name in ("embedding", "logit", "total"):
        assert data["attribution"][name] == pytest.approx(getattr(shares, name), rel=1e-4)
    stream = residual_stream(model, TOKENS)
    for name in ("norm", "drift", "to_last"):
        close(data["residual"][name], getattr(stream, name))
        ordered = getattr(stream, name)[:, 1:].sort().values  # (P, 9): without the first token
        close(data["residual"]["medians"][name], ordered[:, 4])


def test_patterns_stand_in_the_page_layer_by_layer(peaked, tmp_path):
    found = overview(peaked.model, TOKENS)
    write_report(found, peaked.tokenizer, tmp_path / "report.html", model_name="Tiny")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    blocks = {attributes["id"]: text for attributes, text in page.scripts if attributes.get("type") == "text/plain"}
    assert list(blocks) == ["layer-0", "layer-1"]
    for layer in range(2):
        assert [base64.b64decode(head) for head in blocks[f"layer-{layer}"].split(" ")] == found.patterns.heads[layer]


def test_without_a_target_the_likeliest_next_token_is_followed(peaked):
    found = overview(peaked.model, TOKENS)
    assert found.target == peaked.model(torch.tensor([TOKENS]))[0, -1].argmax()
    assert found.lens.target == found.target == found.attribution.target
    assert found.lens.points == [point for point in residual_points(2) if "mid" not in point]
    assert found.attribution.position == len(TOKENS) - 1


def test_progress_comes_to_its_end(peaked):
    told = []
    overview(peaked.model, TOKENS, progress=lambda done, total: told.append((done, total)))
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_quantized_model_and_a_single_token_have_pages_too(tmp_path_factory, tmp_path):
    folder = tiny_folder(tmp_path_factory.mktemp("quantized") / "Tiny")
    llama = Llama.build(folder, device="cpu", dtype="bfloat16", max_seq_len=64)
    quantize_model(llama.model, "int8")
    data = written(llama, [256], tmp_path).data
    assert data["dtype"] == "bfloat16, quantized matrices" and data["attention"]["sink"] == [[None] * 4] * 2


def test_numbers_that_are_none_are_null(tmp_path_factory, tmp_path):
    llama = Llama.build(tiny_folder(tmp_path_factory.mktemp("nan") / "Tiny"), device="cpu", dtype="float32", max_seq_len=64)
    llama.model.layers[0].feed_forward.w2.weight.data[0, 0] = math.nan
    found = overview(llama.model, TOKENS)
    assert found.patterns.unpack(1, 0)[1].isnan().all() and not found.patterns.unpack(0, 0).isnan().any()
    data = written(llama, TOKENS, tmp_path).data
    assert data["attribution"] is None and "the parts add up to nan" in data["not_attributed"]
    lens_data = data["lens"]
    assert lens_data["target_probability"][2] == lens_data["target_rank"][2] == lens_data["entropy"][1] == [None] * 10
    assert None not in lens_data["target_probability"][0] and None not in lens_data["target_rank"][0]
    assert set(data["predictions"]["probability"]) == set(data["predictions"]["rank"]) == {None}


# ---- texts


def test_tokens_have_their_text_bytes_and_what_they_are_parts_of(shallow, tmp_path):
    text = "서울 👍"
    tokens = shallow.encode(text)
    data = written(shallow, tokens, tmp_path).data
    label, written_bytes = data["vocabulary"][str(tokens[0])]
    assert (label, bytes.fromhex(written_bytes)) == ("<|begin_of_text|>", b"<|begin_of_text|>")
    assert b"".join(bytes.fromhex(data["vocabulary"][str(token)][1]) for token in tokens[1:]).decode() == text
    halves = [i for i, token in enumerate(tokens) if data["vocabulary"][str(token)][0].startswith("<0x")]
    assert len(halves) > 5 and {int(position) for position in data["parts"]} >= set(halves)
    assert set("".join(data["parts"].values())) <= set(text)
    shown = {*tokens, data["target"], *flat(data["lens"]["top_ids"])}
    assert {str(token) for token in shown} <= set(data["vocabulary"])


def flat(values: Any) -> list[Any]:
    return [one for value in values for one in flat(value)] if isinstance(values, list) else [values]


def test_a_row_that_is_no_token_has_no_text(peaked, tmp_path):
    model = random_model(vocab_size=600)
    found = overview(model, [599, 1])
    write_report(found, peaked.tokenizer, tmp_path / "report.html", model_name="Wide")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.data["vocabulary"]["599"] == ["<id 599>", None]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_gets_out_of_its_place(peaked, tmp_path, attack):
    tokens = [256, *attack.encode("utf-8", errors="surrogatepass")]
    plain, page = written(peaked, TOKENS, tmp_path), written(peaked, tokens, tmp_path, attack)
    assert page.tags == plain.tags and page.styles == plain.styles and page.policy == plain.policy
    assert page.scripts[-1] == plain.scripts[-1]
    assert [attributes for attributes, _ in page.scripts] == [attributes for attributes, _ in plain.scripts]
    assert page.data["tokens"] == tokens and page.data["model"] == attack
    (data,) = [text for attributes, text in page.scripts if attributes.get("id") == "data"]
    assert data.isascii() and not set("<>&") & set(data)


# ---- the page


def test_the_policy_allows_this_style_and_this_script_alone(peaked, tmp_path):
    page = written(peaked, TOKENS, tmp_path)
    code = page.scripts[-1]
    assert code[0] == {} and len(page.styles) == 1
    style, script = (hash_of(text) for text in (page.styles[0], code[1]))
    assert page.policy.split("; ") == [
        "default-src 'none'",
        f"style-src '{style}'",
        f"script-src '{script}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert set(re.findall(r"\w+://[\w./]+", page.text)) == {"http://www.w3.org/2000/svg"}


def hash_of(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_make_no_markup_of_text(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser", text)
    assert path.suffix == ".html" or "</script" not in text
    assert len(text.splitlines()) <= 500


def test_styles_are_of_what_there_is():
    style, *others = (path.read_text(encoding="utf-8") for path in sorted(SOURCES, key=lambda path: path.suffix != ".css"))
    classes = set(re.findall(r"\.([a-z][\w-]*)(?=[^{}]*\{)", style))
    named = set(re.findall(r"(?<![\w.-])[\w-]+", " ".join(re.findall(r"""["`'][^"`'\n]*["`']""", "\n".join(others)))))
    assert len(classes) > 40 and classes <= named


# ---- the file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.pdf", r"expected a file that ends in \.html or \.htm"),
        ("report", r"expected a file that ends in \.html or \.htm"),
        ("gone/report.html", "there is no folder .*gone: make it first"),
        ("folder.html", "which is a folder: name a file in it"),
        (True, "out is True, expected a file"),
        ("", "out is '', expected a file"),
        (3, "out is 3, expected a file"),
        ("nul\0.html", "expected a file"),
        ("~no-such-user/report.html", "but nothing can be written there: .*home directory; choose another"),
        (f"{'a' * 300}.html", "but nothing can be written there: File name too long; choose another"),
        (f"{'a' * 300}/report.html", "File name too long|there is no folder"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_anything_is_done(peaked, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RequestError, match=message):
        check_report(name)
    with pytest.raises(RequestError, match=message):
        write_report(overview(peaked.model, [256]), peaked.tokenizer, name, model_name="Tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_folder_that_may_not_be_written_is_told(peaked, unprivileged_folder):
    unprivileged_folder.chmod(0o500)
    path = unprivileged_folder / "report.html"
    with pytest.raises(RequestError, match=r"is not writable: choose another folder"):
        check_report(path)
    with pytest.raises(RequestError, match="is not writable"):
        write_report(overview(peaked.model, [256]), peaked.tokenizer, path, model_name="Tiny")
    unprivileged_folder.chmod(0o700)
    assert list(unprivileged_folder.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_leaves_what_was_there(peaked, tmp_path, monkeypatch, error):
    path = tmp_path / "report.html"
    path.write_text("the last one")
    found = overview(peaked.model, TOKENS)

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RequestError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "No space left on device; free some space"):
        write_report(found, peaked.tokenizer, path, model_name="Tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "the last one"


def test_a_missing_source_is_no_fault_of_the_place(peaked, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the last one")
    monkeypatch.setattr(writer, "SCRIPTS", (*writer.SCRIPTS, "gone"))
    with pytest.raises(FileNotFoundError, match=r"page/gone\.js"):
        write_report(overview(peaked.model, [256]), peaked.tokenizer, path, model_name="Tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "the last one"


def test_a_file_is_replaced_where_a_link_leads(peaked, tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "old.html", tmp_path / "link.HTML"
    target.write_text("old")
    link.symlink_to(target)
    check_report(link)
    write_report(overview(peaked.model, [256]), peaked.tokenizer, link, model_name="Tiny")
    assert link.is_symlink() and target.read_text(encoding="utf-8").startswith("<!doctype html>")


# ---- invalid requests


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1] * (MOST_TOKENS + 1), {}, r"the text has 2,049 tokens, but a report holds at most 2,048"),
        ([], {}, "tokens is empty"),
        ([1], {"target": 512}, "token 512 is not in the vocabulary"),
        ([1], {"top": 0}, "top is 0"),
        ([1], {"ids": []}, "ids is empty"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_runs(peaked, monkeypatch, tokens, options, message):
    def run(*args: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(peaked.model, "hidden", run)
    with pytest.raises(RequestError, match=message):
        overview(peaked.model, tokens, **options)


# ---- images


def test_a_page_has_the_image_and_the_shares_of_its_patches(tmp_path):
    model, tokens, image = random_vision_model(), [5, IMAGE, 7, 8], picture(130, 60)
    found = overview(model, tokens, ids=range(256), image=image)
    write_report(found, Tokenizer(byte_tokenizer(tmp_path / "bytes.model")), tmp_path / "page.html", model_name="Seeing")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    data, seen = page.data["image"], found.image
    assert (data["width"], data["height"], data["size"]) == (130, 60, [130, 60])
    assert (data["rows"], data["columns"]) == seen.patches.shape[2:] and data["before"] == [1, 3]
    assert data["positions"] == data["seen_by"] == [1, 2, 3]
    close(data["class_tokens"], seen.class_tokens)
    close(data["beside"], seen.beside)
    blocks = {attributes["id"]: text for attributes, text in page.scripts if "image" in (attributes.get("id") or "")}
    assert list(blocks) == ["image-pixels", "image-layer-0", "image-layer-1"]
    raw = {name: np.frombuffer(zlib.decompress(base64.b64decode(text)), "u1") for name, text in blocks.items()}
    grey = np.asarray(image).mean(-1).round()
    assert np.array_equal(raw["image-pixels"].reshape(60, 130), grey)
    for layer in (0, 1):
        packed = torch.from_numpy(raw[f"image-layer-{layer}"].astype("f4")).view(3, data["rows"], data["columns"])
        shares = (packed / 255) ** 2 * torch.tensor(data["largest"][layer])[:, None, None]
        largest = seen.patches[layer, 1:].max()
        torch.testing.assert_close(shares, seen.patches[layer, 1:], atol=float(largest) / 250, rtol=0)
    assert page.data["vocabulary"][str(IMAGE)][0] == "<|image|>"
    assert page.data["predictions"]["probability"][1] is None
    assert dict(map(tuple, page.data["attribution"]["cross"])) == pytest.approx(found.attribution.cross, rel=1e-4)


def test_a_page_keeps_the_last_tokens_of_a_long_text_and_a_smaller_image():
    patches = torch.rand(2, 200, 5, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.zeros(700, 1000, 3, dtype=torch.uint8)
    none = torch.zeros(2, 200)
    packed = pack_image(ImageAttention(list(range(200)), [1, 3], None, pixels, (1, 1), patches, none, none))
    assert packed.positions == list(range(72, 200)) and packed.size == (334, 234) and packed.largest.shape == (2, 128)
    assert len(zlib.decompress(packed.layers[0])) == 128 * 20 and len(zlib.decompress(packed.pixels)) == 334 * 234


def test_a_page_without_an_image_has_none(peaked, tmp_path):
    page = written(peaked, [256, 84], tmp_path)
    assert page.data["image"] is None and page.data["attribution"]["cross"] == []
    assert not [attributes for attributes, _ in page.scripts if (attributes.get("id") or "").startswith("image")]
