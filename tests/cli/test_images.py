"""`--image` and `/image`."""

import json
from pathlib import Path

import pytest
import torch

from conftest import exit_code
from llama_ref.cli.chat import _used_up, chat
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.session import Session
from vision_folders import noise, vision_folder

GREEDY = ["--temperature", "0", "--max_gen_len", "6", "--dtype", "float32", "--device", "cpu", "--max_seq_len", "256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return vision_folder(tmp_path_factory.mktemp("vision") / "Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(folder) -> Llama:
    return Llama.build(folder, device="cpu", dtype="float32", max_seq_len=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("two images")
    for name, size in (("a.png", (100, 40)), ("b.png", (50, 50))):
        noise(*size).save(root / name)
    return [str(root / "a.png"), str(root / "b.png")]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_complete_shows_its_images_before_the_text(folder, llama, files, capsys, n):
    flags = [word for file in files[:n] for word in ("--image", file)]
    assert exit_code(["complete", str(folder), "Hi", *flags, *GREEDY]) == 0
    expected = "".join(llama.stream("Hi", 6, 0.0, images=files[:n]))
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image"], "--image needs a value: --image FILE"),
        (["--image", "nowhere.png"], "cannot read the image: cannot read nowhere.png"),
        (["--image", __file__], "is not an image that can be read here"),
        (["--images", "a.png"], "did you mean --image"),
    ],
)
def test_what_is_no_image_is_refused_before_the_model_is_loaded(flags, says, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "build", None)
    assert exit_code(["complete", "no folder", "Hi", *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_text_model_says_so(demo_folder, files, capsys):
    assert exit_code(["complete", str(demo_folder), "Hi", "--image", files[0], *GREEDY]) == 2
    assert "this model reads no images; use a vision release" in capsys.readouterr().err


def talk(llama: Llama, lines: list[str], monkeypatch, capsys) -> tuple[Session, str, str]:
    given = iter(lines)

    def following(prompt: str = "") -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", following)
    session = Session(llama)
    chat(session, {"temperature": 0.0, "max_gen_len": 6})
    printed = capsys.readouterr()
    return session, printed.out, printed.err


def test_an_image_goes_with_the_next_message_alone(llama, files, monkeypatch, capsys):
    lines = [f"/image {files[0]}", f'/image "{files[1]}"', "What?", "And now?"]
    session, out, err = talk(llama, lines, monkeypatch, capsys)
    assert "1 image for the next message" in err and "2 images for the next message" in err
    other = Session(llama)
    expected = ["".join(other.say("What?", files, temperature=0.0, max_gen_len=6))]
    expected.append("".join(other.say("And now?", temperature=0.0, max_gen_len=6)))
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert session.dialog == other.dialog


def test_a_reset_forgets_the_images_of_the_next_message(llama, files, monkeypatch, capsys):
    session, _, _ = talk(llama, [f"/image {files[0]}", "/reset", "Hi"], monkeypatch, capsys)
    assert session.dialog[0]["content"] == "Hi"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image", "/image needs a file name"),
        ("/image ''", "/image needs a file name"),
        ("/image nowhere.png", "cannot read the image"),
        ("/imag a", "did you mean /image?"),
    ],
)
def test_a_line_that_shows_no_image_is_explained_and_the_conversation_goes_on(llama, line, says, monkeypatch, capsys):
    session, _, err = talk(llama, [line, "Hi"], monkeypatch, capsys)
    assert says in err
    assert session.dialog[0]["content"] == "Hi"


def test_an_image_that_is_gone_does_not_stop_the_conversation(llama, tmp_path):
    session, images = Session(llama), [str(tmp_path / "gone.png")]
    with pytest.raises(RequestError, match="cannot read the image"):
        session.say("What?", _used_up(images))
    assert images == [] and session.dialog == []


@pytest.mark.parametrize("typed", ['it\'s "1".png', 'it\\\'s\\ \\"1\\".png', """'it'"'"'s "1".png'"""])
def test_a_file_may_be_typed_or_pasted(llama, typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise(50, 50).save('it\'s "1".png')
    _, _, err = talk(llama, [f"/image {typed}"], monkeypatch, capsys)
    assert "1 image for the next message" in err


def test_a_text_model_refuses_an_image_and_the_conversation_goes_on(peaked, files, monkeypatch, capsys):
    session, _, err = talk(peaked, [f"/image {files[0]}", "Hi"], monkeypatch, capsys)
    assert "this model reads no images" in err
    assert session.dialog[0]["content"] == "Hi"


def test_a_saved_conversation_shows_its_images_again(llama, files, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "talk.json"
    talk(llama, [f"/image {files[0]}", "What?", f"/save {saved}"], monkeypatch, capsys)
    assert json.loads(saved.read_text())[0]["content"][0] == {"type": "image", "image": files[0]}
    session, _, _ = talk(llama, [f"/load {saved}", "And now?"], monkeypatch, capsys)
    assert len(session.dialog) == 4
