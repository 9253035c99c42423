"""End-of-text ids and chat templates of other fine-tunes are used, kept, or named in a warning."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import exit_code
from folders import tiny_folder
from llama_ref.checkpoint.describe import describe
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.hf.conventions import chat_template_of, end_ids
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.writing.convert import to_hugging_face, to_meta
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.generation import Llama
from llama_ref.session import Session

GENERATION, CONFIG, TOKENIZER_CONFIG = "generation_config.json", "config.json", "tokenizer_config.json"
USUAL = [257, 264, 265]
IM_END = 509  # an ordinary reserved token, renamed
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADERS = "{{ '<|start_header_id|>' + role + '<|end_header_id|>' + content + '<|eot_id|>' }}"
DIALOG = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("conventions")
    return to_hugging_face(tiny_folder(root / "tiny"), root / "hf")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A small Hugging Face folder with the added token <|im_end|> but no end-of-text ids."""
    copy = tmp_path / "fine-tune"
    copy.mkdir()
    for path in original.iterdir():
        if path.name not in ("checklist.chk", GENERATION):
            (copy / path.name).write_bytes(path.read_bytes())
    edit(copy / CONFIG, eos_token_id=None)
    edit(copy / TOKENIZER_CONFIG, eos_token=None, chat_template=None)
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer.replace("<|reserved_special_token_243|>", "<|im_end|>"))
    return copy


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def built(folder: Path) -> Llama:
    return Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32", verify="never")


# ---- ends


ENDS = {
    "nothing said": ({}, []),
    "a number": ({GENERATION: {"eos_token_id": IM_END}}, [IM_END]),
    "a list": ({GENERATION: {"eos_token_id": [257, IM_END]}}, [257, IM_END]),
    "in config.json": ({CONFIG: {"eos_token_id": IM_END}}, [IM_END]),
    "in both": ({GENERATION: {"eos_token_id": 265}, CONFIG: {"eos_token_id": [IM_END, 265]}}, [265, IM_END]),
    "an ordinary token": ({CONFIG: {"eos_token_id": 2}}, [2]),
    "a default left over": ({GENERATION: {"eos_token_id": 265}, CONFIG: {"eos_token_id": 2}}, [265]),
    "by the tokenizer": ({TOKENIZER_CONFIG: {"eos_token": "<|im_end|>"}}, [IM_END]),
    "as an object": ({TOKENIZER_CONFIG: {"eos_token": {"content": "<|im_end|>", "special": True}}}, [IM_END]),
    "an unknown text": ({TOKENIZER_CONFIG: {"eos_token": "</s>"}}, []),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_text_ends_where_the_folders_files_say(folder, case, caplog):
    changes, expected = ENDS[case]
    for name, change in changes.items():
        edit(folder / name, **change)
    tokenizer = open_folder(folder).open_tokenizer(open_folder(folder).read_args())
    assert tokenizer.decode([IM_END]) == "<|im_end|>"
    assert end_ids(folder, tokenizer.vocabulary) == expected
    assert tokenizer.stop_tokens == USUAL + [i for i in expected if i not in USUAL]
    assert not caplog.records


@pytest.mark.parametrize(
    "value", [512, -1, True, "2", 2.0, {"id": 2}, [IM_END, None], 10**400], ids=lambda value: f"{value}"[:9]
)
def test_what_is_no_token_is_no_end_and_a_warning_says_so(folder, value, caplog):
    edit(folder / GENERATION, eos_token_id=value)
    assert built(folder).tokenizer.stop_tokens[3:] == ([IM_END] if isinstance(value, list) else [])
    assert "generation_config.json: eos_token_id is" in caplog.text and "expected ids from 0 to 511" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"[1]", b"\xff"])
def test_a_file_that_cannot_be_read_is_ignored_with_a_warning(folder, content, caplog):
    for name in (GENERATION, TOKENIZER_CONFIG):
        (folder / name).write_bytes(content)
    assert built(folder).tokenizer.stop_tokens == USUAL
    assert ("the file is ignored" in caplog.text) == (content != b"[1]")


def test_generation_stops_at_the_folders_own_end(folder):
    prompt, greedy = [[256, 104, 105]], {"max_gen_len": 12, "temperature": 0}
    (unstopped,), _ = built(folder).generate(prompt, **greedy)
    end = next(token for token in unstopped[2:] if token not in unstopped[:2])
    edit(folder / GENERATION, eos_token_id=[257, end])
    llama = built(folder)
    assert llama.generate(prompt, **greedy)[0] == [unstopped[: unstopped.index(end)]]
    stream = llama.stream(prompt[0], **greedy)
    list(stream)
    assert stream.finish_reason == "stop"
    assert llama.formatter.decode_assistant_message([104, end]) == {
        "role": "assistant",
        "content": "h",
        "stop_reason": "end_of_turn",
    }


# ---- templates


def in_tokenizer_config(template: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / TOKENIZER_CONFIG, chat_template=template)


PLACES = {
    "tokenizer_config.json": in_tokenizer_config(CHATML),
    "several by name": in_tokenizer_config([{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text(CHATML),
    "chat_template.json": lambda folder: edit(folder / "chat_template.json", chat_template=CHATML),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_foreign_template_is_found_and_warned_of_once(folder, place, caplog, capsys):
    PLACES[place](folder)
    assert chat_template_of(folder) == CHATML
    llama = built(folder)
    llama.text_completion(["hi"], max_gen_len=1)
    assert not caplog.records
    for _ in range(2):
        llama.chat_completion([DIALOG], max_gen_len=1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "chat template that is not Llama 3's" in caplog.text and str(folder) in caplog.text
    assert "write the prompt yourself with its special tokens (llama-ref complete --special_tokens, " in caplog.text
    Session(built(folder))
    assert len(caplog.records) == 2
    assert describe(open_folder(folder)).foreign_chat_template
    assert exit_code(["info", str(folder)]) == 0 and "chat template" in capsys.readouterr().out


@pytest.mark.parametrize("template", [None, HEADERS, [{"name": "default", "template": HEADERS}], "own"], ids=str)
def test_llama_3s_templates_are_not_warned_of(folder, original, template, caplog):
    if template == "own":
        template = json.loads((original / TOKENIZER_CONFIG).read_text())["chat_template"]
    edit(folder / TOKENIZER_CONFIG, chat_template=template)
    built(folder).chat_completion([DIALOG], max_gen_len=1)
    assert not caplog.records and not describe(open_folder(folder)).foreign_chat_template


# ---- conversion


def test_conversion_there_and_back_keeps_ends_and_template(folder, tmp_path, caplog):
    edit(folder / GENERATION, eos_token_id=[257, IM_END], temperature=0.1)
    edit(folder / TOKENIZER_CONFIG, eos_token="<|im_end|>", chat_template=CHATML)
    native = to_meta(folder, tmp_path / "native")
    assert "chat template that is not Llama 3's" in caplog.text
    assert verify(native).summary() == "all 6 files are whole"
    quantized = quantize_folder(native, tmp_path / "int8", "int8")
    resharded = to_meta(native, tmp_path / "two", shards=2)
    for converted in (native, quantized, resharded):
        assert verify(converted).ok
        assert built(converted).tokenizer.stop_tokens == [*USUAL, IM_END]
        assert chat_template_of(converted) == CHATML
    back = to_hugging_face(native, tmp_path / "back")
    read = {name: json.loads((back / name).read_text()) for name in (GENERATION, CONFIG, TOKENIZER_CONFIG)}
    assert read[GENERATION]["eos_token_id"] == read[CONFIG]["eos_token_id"] == [257, IM_END]
    assert read[GENERATION]["temperature"] == 0.1
    assert (read[TOKENIZER_CONFIG]["eos_token"], read[TOKENIZER_CONFIG]["chat_template"]) == ("<|im_end|>", CHATML)


def test_a_base_model_stays_one(folder, tmp_path):
    edit(folder / CONFIG, eos_token_id=257)
    back = to_hugging_face(to_meta(folder, tmp_path / "native"), tmp_path / "back")
    assert json.loads((back / GENERATION).read_text())["eos_token_id"] == 257
    assert json.loads((back / CONFIG).read_text())["eos_token_id"] == 257
    assert chat_template_of(back) is None


def test_what_llama_3_has_anyway_is_not_written(original, tmp_path):
    native = to_meta(original, tmp_path / "native")
    assert {path.name for path in native.iterdir()} == {
        "params.json",
        "consolidated.00.pth",
        "tokenizer.model",
        "checklist.chk",
    }
