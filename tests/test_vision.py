"""Images in prompts, dialogs, streams and conversations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fake_cuda import fake_cuda
from llama_ref.args import ModelArgs
from llama_ref.bench.costs import flops, weight_bytes
from llama_ref.bench.settings import Settings
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.empty_model import model_without_memory
from llama_ref.checkpoint.loading.loader import load_model
from llama_ref.decoding import image_prompts
from llama_ref.decoding.loop import prefill
from llama_ref.decoding.row import Row
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.images import Tiles
from llama_ref.kv_cache import KVCache
from llama_ref.model import Transformer
from llama_ref.session import Session
from llama_ref.vision import VisionEncoder, VisionTransformer
from vision_folders import IMAGE_ID, PARAMS, noise, vision_folder

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_gen_len": 6}
A, B, C = noise(100, 40, 1), noise(50, 50, 2), noise(60, 200, 3)
BOS = 256
FEW_LAYERS = {"n_layers": 2, "vision_num_cross_attention_layers": 1, "vision_n_layers": 2, "vision_kept_layers": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return vision_folder(tmp_path_factory.mktemp("vision") / "Llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(folder) -> Llama:
    return Llama.build(folder, device="cpu", dtype="float32", max_seq_len=512)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of tiles of each image that was encoded."""
    found: list[int] = []
    forward = VisionEncoder.forward

    def counting(self, tiles, grid):
        found.append(len(tiles))
        return forward(self, tiles, grid)

    monkeypatch.setattr(VisionEncoder, "forward", counting)
    return found


def image_of(tmp_path: Path) -> str:
    A.save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


# --- Llama.generate


def test_an_image_changes_the_answer(llama):
    prompt = [BOS, IMAGE_ID, 70, 71]
    answers = [llama.generate([prompt], images=[[image]], **GREEDY)[0] for image in (A, B)]
    assert answers[0] != answers[1]


def test_each_row_of_a_batch_gets_what_it_gets_alone(llama):
    prompts = [[BOS, IMAGE_ID, 70, 71], [BOS, 70, 71], [BOS, 80, IMAGE_ID, IMAGE_ID, 81, 82, 83, IMAGE_ID, 84], [BOS, 9, 9, 9]]
    images = [[A], [], [B, C, A], []]
    together, scores = llama.generate(prompts, images=images, logprobs=True, **GREEDY)
    for row, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        alone, own_scores = llama.generate([prompt], images=[own], logprobs=True, **GREEDY)
        assert together[row] == alone[0]
        assert scores[row] == pytest.approx(own_scores[0], abs=1e-4)


def test_prompts_run_in_pieces_give_the_same(llama, monkeypatch):
    prompt = [BOS, 60, IMAGE_ID, *range(20, 60), IMAGE_ID, *range(30, 50)]
    whole = llama.generate([prompt], images=[[A, B]], logprobs=True, echo=True, **GREEDY)
    for size in (1, 7, 16):
        monkeypatch.setattr("llama_ref.decoding.reading.PREFILL_TOKENS", size)
        pieces = llama.generate([prompt], images=[[A, B]], logprobs=True, echo=True, **GREEDY)
        assert pieces[0] == whole[0]
        assert pieces[1][0] == pytest.approx(whole[1][0], abs=1e-4)


def test_an_images_log_probability_is_0_and_it_is_echoed(llama):
    prompt = [BOS, 70, IMAGE_ID, 71]
    tokens, scores = llama.generate([prompt], images=[[A]], logprobs=True, echo=True, **GREEDY)
    assert tokens[0][:4] == prompt
    assert scores[0][0] == scores[0][2] == 0.0
    assert scores[0][1] < 0 and scores[0][3] < 0
    (echoed,) = llama.text_completion(["FG"], images=[[A]], logprobs=True, echo=True, **GREEDY)
    assert echoed["generation"].startswith("<|begin_of_text|><|image|>FG")
    assert echoed["tokens"][:4] == ["<|begin_of_text|>", "<|image|>", "F", "G"]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (None, r"prompt 0 has 2 places for images \(id 512\), but 0 images"),
        ([[A]], "prompt 0 has 2 places for images .*, but 1 images"),
        ([[A, A, A]], "but 3 images"),
        ([], "images has 0 lists, expected one for each of 1 prompts"),
        ([A, A], "images has 2 lists, expected one for each of 1 prompts"),
        (["a.png"], "images has 'a.png' for prompt 0, expected a list of images"),
        ("a.png", "images is 'a.png', expected a list with the images of each prompt"),
        (A, "expected a list with the images of each prompt"),
        ([A], "expected a list of images"),
        ([[A, "nowhere.png"]], "cannot read the image"),
    ],
)
def test_images_that_do_not_fit_the_prompt_are_refused(llama, images, says):
    with pytest.raises(RequestError, match=says):
        llama.generate([[BOS, IMAGE_ID, 70, IMAGE_ID]], images=images, **GREEDY)


def test_an_images_place_may_be_spelled_as_a_special_token(llama):
    ids = llama.encode("a<|image|>b", special_tokens=True)
    assert ids == [BOS, ord("a"), IMAGE_ID, ord("b")]
    assert llama.encode(llama.decode(ids), special_tokens=True) == ids
    found = llama.text_completion(["a<|image|>b"], images=[[A]], special_tokens=True, **GREEDY)
    expected, _ = llama.generate([ids], images=[[A]], **GREEDY)
    assert found[0]["generation"] == llama.tokenizer.decode(expected[0])
    with pytest.raises(RequestError, match="prompt 0 has 1 places for images"):
        llama.text_completion(["a<|image|>b"], special_tokens=True)


def test_ids_after_the_images_are_outside_the_vocabulary(llama):
    with pytest.raises(RequestError, match="the prompt has token 513"):
        llama.generate([[BOS, 513]], **GREEDY)


def test_penalties_and_bias_do_not_count_images(llama):
    options = {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "temperature": 0.7, "seed": 3, "max_gen_len": 4}
    assert llama.generate([[BOS, IMAGE_ID, 70]], images=[[A]], **options)


# --- text alone


def test_text_alone_computes_what_the_text_model_computes(llama, folder, encoded):
    """The text model's tensors in a vision folder form a complete model."""
    state = llama.model.state_dict()
    text = Transformer(open_folder(folder).read_args())
    text.load_state_dict({name: state[name] for name in text.state_dict()})
    tokens = torch.tensor([[BOS, 70, 71, 72, 73]])
    calls = []
    handles = [layer.register_forward_hook(lambda *args: calls.append(args)) for layer in llama.model.cross_attention_layers]
    assert torch.equal(llama.model(tokens), text.eval()(tokens))
    alone = Llama(text, llama.tokenizer, max_seq_len=512)
    prompts = [[BOS, 70, 71], [BOS, 72]]
    assert llama.generate(prompts, logprobs=True, **GREEDY) == alone.generate(prompts, logprobs=True, **GREEDY)
    assert not encoded and not calls
    for handle in handles:
        handle.remove()


def test_a_text_before_its_image_is_the_text_models(llama):
    """Cross-attention layers do not change tokens before an image."""
    prompt = [BOS, 70, 71, 72, 73]
    _, scores = llama.generate([[*prompt, IMAGE_ID]], images=[[A]], logprobs=True, echo=True, **GREEDY)
    _, without = llama.generate([prompt], logprobs=True, echo=True, **GREEDY)
    assert scores[0][:5] == pytest.approx(without[0][:5], abs=1e-5)


# --- dialogs


def dialog(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


def test_a_dialogs_images_stand_where_they_are(llama, tmp_path):
    path = image_of(tmp_path)
    asked = dialog({"type": "text", "text": "a"}, {"type": "image", "image": path}, {"type": "text", "text": "b"})
    ids = llama.encode(asked)
    header = llama.encode([{"role": "user", "content": "ab"}])
    at = header.index(ord("a"))
    assert ids == [*header[: at + 1], IMAGE_ID, *header[at + 1 :]]
    (answer,) = llama.chat_completion([asked], **GREEDY)
    expected, _ = llama.generate([ids], images=[[A]], **GREEDY)
    assert answer["generation"]["content"] == llama.tokenizer.decode(expected[0])
    stream = llama.stream(asked, **GREEDY)
    assert "".join(stream) == answer["generation"]["content"]


def test_a_text_of_items_is_that_text(llama):
    parts = dialog({"type": "text", "text": "ab"}, {"type": "text", "text": "cd"})
    assert llama.encode(parts) == llama.encode([{"role": "user", "content": "abcd"}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "picture", "image": "a.png"}], "content is a text, or a list of items like"),
        (["text"], "got 'text'"),
        ([{"type": "image"}], "an item of type 'image' needs its 'image'"),
        ([{"type": "text", "text": 5}], "an item of type 'text' needs its 'text'"),
        ([{"type": "image_url", "image_url": {"url": "http://a"}}], "got {'type': 'image_url'"),
    ],
)
def test_malformed_items_are_refused(llama, content, says):
    with pytest.raises(RequestError, match=says):
        llama.chat_completion([[{"role": "user", "content": content}]], **GREEDY)


def test_only_users_show_images(llama):
    item = [{"type": "image", "image": A}]
    with pytest.raises(RequestError, match="only a user's message has images, this one's role is 'system'"):
        llama.chat_completion([[{"role": "system", "content": item}, {"role": "user", "content": "b"}]], **GREEDY)


@pytest.mark.parametrize("images", ["a.png", A, 7, 0, "", torch.zeros(3)])
def test_one_image_is_a_list_too(llama, images):
    with pytest.raises(RequestError, match="expected a list of images"):
        llama.stream("Hi", images=images)
    with pytest.raises(RequestError, match="expected a list of images"):
        Session(llama).say("Hi", images)


def test_a_dialog_has_its_images_itself(llama):
    with pytest.raises(RequestError, match="leave out images"):
        llama.stream(dialog({"type": "text", "text": "a"}), images=[A])


# --- text models


def test_text_models_refuse_images(peaked):
    with pytest.raises(RequestError, match="this model reads no images; use a vision release"):
        peaked.generate([[BOS, 1]], images=[[A]])
    with pytest.raises(RequestError, match="this model reads no images"):
        peaked.stream("Hi", images=[A])
    with pytest.raises(RequestError, match="this model reads no images"):
        peaked.chat_completion([dialog({"type": "image", "image": A})])
    with pytest.raises(RequestError, match="this model reads no images"):
        Session(peaked).say("Hi", [A])


# --- conversations


def test_a_conversation_encodes_each_image_once_and_answers_as_from_anew(llama, encoded):
    session = Session(llama)
    turns = [("What?", [A]), ("And now?", []), ("Compare.", [B, C]), ("Go on.", [])]
    for number, (text, images) in enumerate(turns, 1):
        before = list(encoded)
        answer = "".join(session.say(text, images, **GREEDY))
        assert len(encoded) - len(before) == len(images)
        prompt, shown = session._turn[1].row.prompt, session._turn[1].row.images
        assert len(shown) == sum(len(own) for _, own in turns[:number])
        anew, _ = llama.generate([prompt], images=[shown], **GREEDY)
        assert answer == llama.tokenizer.decode(anew[0])
        del encoded[:]


def test_an_interrupted_turns_image_is_forgotten(llama):
    session, other = Session(llama), Session(llama)
    "".join(session.say("Hi", **GREEDY)), "".join(other.say("Hi", **GREEDY))
    session.say("What?", [A]).close()  # nothing was shown
    found = "".join(session.say("And this?", [B], **GREEDY))
    assert found == "".join(other.say("And this?", [B], **GREEDY))
    assert session.dialog == other.dialog


def test_a_turn_with_what_is_no_image_changes_nothing(llama):
    session = Session(llama)
    "".join(session.say("Hi", [A], **GREEDY))
    before = session.dialog
    with pytest.raises(RequestError, match="cannot read the image"):
        session.say("And?", ["nowhere.png"])
    assert session.dialog == before
    assert "".join(session.say("Go on", **GREEDY))


def test_a_conversation_is_saved_with_its_images_paths(llama, tmp_path):
    session = Session(llama)
    path = image_of(tmp_path)
    "".join(session.say("What?", [path], **GREEDY))
    session.save(tmp_path / "talk.json")
    other = Session(llama)
    other.load(tmp_path / "talk.json")
    assert other.dialog == session.dialog
    Path(path).unlink()
    with pytest.raises(RequestError, match="cannot read the image"):
        other.load(tmp_path / "talk.json")
    assert other.dialog == session.dialog
    held = Session(llama)
    "".join(held.say("What?", [A], **GREEDY))
    with pytest.raises(RequestError, match="an image that is not a file"):
        held.save(tmp_path / "other.json")


def test_reset_forgets_images(llama):
    session = Session(llama)
    "".join(session.say("What?", [A], **GREEDY))
    session.reset()
    found = "".join(session.say("Hi", **GREEDY))
    assert found == "".join(Session(llama).say("Hi", **GREEDY))


# --- bench and other commands


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"quantize": "int4:group=32"}, {"compile": True}, {"speculate": "ngram"}]
)
def test_options_of_loading_work_with_images(folder, llama, options):
    other = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=512, **options)
    prompt = [BOS, IMAGE_ID, 70, 71]
    found, scores = other.generate([prompt], images=[[A]], logprobs=True, echo=True, **GREEDY)
    expected, exact = llama.generate([prompt], images=[[A]], logprobs=True, echo=True, **GREEDY)
    if "quantize" in options:
        assert scores[0][:4] == pytest.approx(exact[0][:4], abs=0.7) and scores != exact
    else:
        assert found == expected
        assert scores[0] == pytest.approx(exact[0], abs=1e-4)


def test_a_draft_model_of_text_guesses_beside_images(folder, llama, tmp_path):
    state, args = llama.model.state_dict(), open_folder(folder).read_args()
    small = vision_folder(tmp_path / "small", {key: value for key, value in PARAMS.items() if not key.startswith("vision_")})
    other = Llama.build(folder, device="cpu", dtype="float32", max_seq_len=512, draft=small)
    prompt = [BOS, IMAGE_ID, 70, 71]
    assert other.generate([prompt], images=[[A]], **GREEDY) == llama.generate([prompt], images=[[A]], **GREEDY)
    assert args.has_vision and state


def test_quantizing_leaves_the_encoder_and_covers_the_cross_attention_layers(folder):
    opened = open_folder(folder)
    model = load_model(opened, opened.read_args(), quantize="int8")
    assert isinstance(model, VisionTransformer)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["cross_attention_layers.0.attention.wk"] == "Int8Linear"
    assert not any("Int8" in kind for name, kind in kinds.items() if name.startswith("vision_model"))


def test_spans_have_no_gap_and_no_overlap_of_texts():
    assert image_prompts.spans([1, 3]) == [(1, 3), (3, image_prompts.ALWAYS)]
    assert image_prompts.spans([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prompts_with_images_stay_on_the_device(dtype):
    """Checked by PyTorch's rules for devices and dtypes; see fake_cuda.py."""
    args = ModelArgs.from_dict(PARAMS | FEW_LAYERS)
    with fake_cuda(), torch.inference_mode():
        model = model_without_memory(args)
        weights = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        prompts = [[BOS, 5, IMAGE_ID, 70, 71], [BOS, 5, 6]]
        rows = [Row(prompts[0], 3, [Tiles(torch.empty(2, 3, 56, 56, device="cpu"), (1, 2))]), Row(prompts[1], 3)]
        cache = KVCache(model.args, 2, 16, dtype=dtype, device="cuda")
        logits = prefill(model, rows, cache, False)
        assert (logits.shape, logits.dtype, logits.device.type) == ((2, 512), torch.float32, "cuda")
        assert cache.images.keys.dtype == dtype and cache.images.begins.device.type == "cuda"
        assert model(torch.zeros(2, 1, dtype=torch.long, device="cuda"), cache).device.type == "cuda"


def test_benchmarks_count_what_a_text_reads(llama):
    """For a vision folder, they count only its text model."""
    text = Transformer(llama.model.args.text_only())
    assert weight_bytes(llama.model, llama.model.tok_embeddings) == weight_bytes(text, text.tok_embeddings)
    assert flops(llama.model.args, 7, 28, 1) == flops(text.args, 7, 28, 1)


def test_other_programs_are_not_compared_on_vision_folders(folder):
    with pytest.raises(RequestError, match="is a vision model: other programs are compared on text models only"):
        Settings.parse(str(folder), prompt_len=4, gen_len=4, batch="1", against="meta", rounds=1, device="cpu")
