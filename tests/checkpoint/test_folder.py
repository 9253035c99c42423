"""Find a folder by name or path, and its files."""

import json
import unicodedata
from pathlib import Path

import pytest

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import checkpoints_root, find_folder, list_folders, open_folder
from llama_ref.errors import CheckpointError, FolderNotFound

FILES = ("params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty `checkpoints` folder, where releases are looked up."""
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / "config"))
    path = tmp_path / "config" / "checkpoints"
    path.mkdir(parents=True)
    return path


def fill(folder: Path, names=FILES) -> Path:
    """Create a folder with these files; opening it reads none of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_the_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_MODELS_CONFIG_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoints_root() == tmp_path / ".llama" / "checkpoints"
    for value in ("", "~/.llama"):
        monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", value)
        assert checkpoints_root() == tmp_path / ".llama" / "checkpoints"
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", "/data/llama")
    assert checkpoints_root() == Path("/data/llama/checkpoints")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Llama3.2-1B-Instruct", "Llama3.2-1B-Instruct"),
        ("Llama3.2-1B-Instruct:int4-qlora-eo8", "Llama3.2-1B-Instruct-int4-qlora-eo8"),
        ("Llama3.2-1B-Instruct-int4-qlora-eo8", "Llama3.2-1B-Instruct-int4-qlora-eo8"),
        ("Llama3.1-405B:bf16-mp16", "Llama3.1-405B-bf16-mp16"),
    ],
)
def test_a_release_is_found_by_name(root, name, folder):
    fill(root / folder)
    assert find_folder(name) == root / folder
    assert open_folder(name).name == folder


def test_a_path_is_a_path_first(root, tmp_path, monkeypatch):
    fill(root / "here")
    fill(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert find_folder("here") == Path("here")
    assert find_folder(str(tmp_path / "here")) == find_folder(tmp_path / "here") == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~/here") == tmp_path / "here"
    colon = fill(tmp_path / "a:b")
    assert find_folder(colon) == colon


def test_a_wrong_name_lists_what_is_there(root):
    fill(root / "Llama3.2-1B")
    fill(root / "Llama3.1-8B")
    fill(root / ".Llama3.1-70B.partial")
    (root / "notes.txt").write_text("")
    assert list_folders() == [root / "Llama3.1-8B", root / "Llama3.2-1B"]
    for wrong in ("Llama3.2-1c", "", "a\0b", "~nobody-of-that-name/x"):
        with pytest.raises(FolderNotFound) as error:
            find_folder(wrong)
        assert str(error.value).endswith(f"{root} holds: Llama3.1-8B, Llama3.2-1B")


OTHER_SPELLINGS = {
    "meta-llama/Llama-3.2-1B-Instruct": "Llama3.2-1B-Instruct",
    "Llama-3.2-1B-Instruct": "Llama3.2-1B-Instruct",
    "llama3.2-1b-instruct": "Llama3.2-1B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B": "Llama3.1-8B",
    unicodedata.normalize("NFC", "한국어 모델"): unicodedata.normalize("NFD", "한국어 모델"),
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_a_release_is_found_by_other_spellings(root, name):
    for folder in OTHER_SPELLINGS.values():
        fill(root / folder)
    assert open_folder(name).path == root / OTHER_SPELLINGS[name]


@pytest.mark.parametrize(("typed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_is_found_in_either_unicode_form(tmp_path, typed, stored):
    path = fill(tmp_path / unicodedata.normalize(stored, "모델") / unicodedata.normalize(stored, "한국어"))
    assert find_folder(tmp_path / unicodedata.normalize(typed, "모델") / unicodedata.normalize(typed, "한국어")) == path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Llama3.2-1B-Instrct", "did you mean Llama3.2-1B-Instruct"),
        ("Llama-Guard-3-8", "did you mean the release Llama-Guard-3-8B"),
        ("models/llama3.2-1b", "did you mean models/Llama3.2-1B?"),
        ("/nowhere/x:1", "no checkpoint at /nowhere/x:1. "),
        ("models", "give one of models/Llama3.2-1B"),
        ("405B", "give one of 405B/original/mp16, 405B/original/mp8"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered_with_one_that_does(root, tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    fill(root / "Llama3.2-1B-Instruct")
    fill(tmp_path / "models" / "Llama3.2-1B")
    fill(tmp_path / "405B" / "original" / "mp8")
    fill(tmp_path / "405B" / "original" / "mp16")
    with pytest.raises(CheckpointError) as error:
        open_folder(name)
    assert says in str(error.value)


def test_the_only_copy_in_original_is_opened_and_has_the_repositorys_name(tmp_path):
    inner = fill(tmp_path / "Llama-3.1-405B" / "original" / "mp16")
    for path in (tmp_path / "Llama-3.1-405B", inner):
        assert open_folder(path).path == inner and open_folder(path).name == "Llama-3.1-405B"


def test_a_repository_in_hugging_faces_cache_is_its_snapshot(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B"
    old, new = (fill(cached / "snapshots" / revision) for revision in ("0a", "1b"))
    for name in (cached, "meta-llama/Llama-3.2-1B"):
        with pytest.raises(FolderNotFound, match=r"has 2 snapshots: give the path of one, such as .*0a"):
            find_folder(name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1b")
    for name in (cached, "meta-llama/Llama-3.2-1B", new):
        assert open_folder(name).path == new and open_folder(name).name == "Llama-3.2-1B"
    assert find_folder(old) == old


@pytest.mark.parametrize("config", ["missing", "~nobody-of-that-name", "a file"])
def test_without_a_root_the_error_says_where_it_would_be(tmp_path, monkeypatch, config):
    (tmp_path / "a file").mkdir()
    (tmp_path / "a file" / "checkpoints").write_text("")
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / config) if config[0] != "~" else config)
    assert list_folders() == []
    with pytest.raises(FolderNotFound, match=r"/checkpoints holds no checkpoints; set LLAMA_MODELS_CONFIG_DIR"):
        find_folder("Llama3.2-1B")


def test_a_file_is_answered_with_its_folder(root):
    folder = fill(root / "Llama3.2-1B")
    with pytest.raises(FolderNotFound, match=r"consolidated\.00\.pth is a file; give the folder that holds it") as error:
        open_folder(folder / "consolidated.00.pth")
    assert str(folder) in str(error.value)


def test_too_long_a_name_is_an_error_of_ours(root):
    with pytest.raises(CheckpointError, match="File name too long"):
        find_folder("The capital of France is " * 200)


def test_all_files_of_a_folder_are_named(tmp_path):
    shards = tuple(f"consolidated.{number:02d}.pth" for number in range(11))
    path = fill(tmp_path / "Llama3.1-70B", [*reversed(shards), *FILES, "fp8_scales_0.pt", "._consolidated.00.pth", "x.pth"])
    folder = open_folder(path)
    assert folder.path == path and folder.name == "Llama3.1-70B"
    assert folder.shards == tuple(path / shard for shard in shards)
    assert folder.weights == (*folder.shards, path / "fp8_scales_0.pt")
    assert folder.shard_bytes == sum(map(len, (*shards, "fp8_scales_0.pt")))
    assert (folder.params, folder.tokenizer, folder.checklist) == tuple(path / FILES[i] for i in (0, 2, 3))


def test_a_hundredth_shard_follows_the_ninety_ninth(tmp_path):
    path = fill(tmp_path, ["params.json", *(f"consolidated.{number:02d}.pth" for number in range(102))])
    assert [shard.name for shard in open_folder(path).shards[98:]] == [f"consolidated.{n}.pth" for n in (98, 99, 100, 101)]


def test_checklist_and_tokenizer_may_be_absent(tmp_path):
    folder = open_folder(fill(tmp_path, FILES[:2]))
    assert folder.tokenizer is None and folder.checklist is None


@pytest.mark.parametrize("named", ["repository", "original"])
def test_a_hugging_face_repository_leads_to_its_original_folder(tmp_path, named):
    repository = fill(tmp_path / "Llama-3.2-1B", ["config.json", "model.safetensors"])
    original = fill(repository / "original", FILES[:3])
    folder = open_folder(repository if named == "repository" else original)
    assert (folder.path, folder.name, folder.checklist) == (original, "Llama-3.2-1B", None)


def test_a_relative_path_still_has_a_name(tmp_path, monkeypatch):
    fill(tmp_path / "Llama-3.2-1B" / "original")
    monkeypatch.chdir(tmp_path / "Llama-3.2-1B" / "original")
    assert open_folder(".").name == "Llama-3.2-1B"
    monkeypatch.chdir(fill(tmp_path / "Llama3.2-1B"))
    assert open_folder(".").name == "Llama3.2-1B"


@pytest.mark.parametrize(
    ("numbers", "lacks"),
    [
        (["01"], "up to consolidated.01.pth but lacks consolidated.00.pth;"),
        (
            ["00", "02", "05"],
            "up to consolidated.05.pth but lacks consolidated.01.pth, consolidated.03.pth, consolidated.04.pth;",
        ),
        (["00", "9" * 200], "lacks " + ", ".join(f"consolidated.{n:02d}.pth" for n in range(1, 9)) + ", …;"),
    ],
)
def test_gaps_in_the_shards_are_named(tmp_path, numbers, lacks):
    path = fill(tmp_path, ["params.json", *(f"consolidated.{number}.pth" for number in numbers)])
    with pytest.raises(CheckpointError) as error:
        open_folder(path)
    assert lacks in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(("n_bytes", "says"), [(0, "so remove model.safetensors"), (17 << 20, "remove one of them")])
def test_an_index_beyond_its_limit_decides_nothing(tmp_path, n_bytes, says):
    fill(tmp_path, ["config.json", "model.safetensors", "model-00001-of-00001.safetensors"])
    index = json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index + " " * n_bytes)
    with pytest.raises(CheckpointError, match=says):
        open_folder(tmp_path)


def test_other_spellings_of_a_number_are_no_shards(tmp_path):
    strays = [f"consolidated.{stray}" for stray in ("0.pth", "000.pth", "٠١.pth", "01.pth.part", "01.PTH")]
    assert len(open_folder(fill(tmp_path, [*FILES, *strays])).shards) == 1


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], r"is empty; fetch params\.json, consolidated\.00\.pth, tokenizer\.model and checklist\.chk"),
        (["config.json", "model-00001-of-00002.safetensors"], "lacks model-00002-of-00002.safetensors; fetch what is missing"),
        (["config.json", "model.safetensors", "model-00001-of-00001.safetensors"], "two models; remove one"),
        (
            ["config.json", "model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"],
            "files of 2 and of 3: two models",
        ),
        (["model.safetensors", "tokenizer.json"], "holds safetensors but lacks config.json"),
        (["config.json", "pytorch_model.bin"], r"as pickles \(\.bin\)"),
        (["config.json", "tokenizer.json"], "has config.json but no model.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], r"holds an adapter \(LoRA\)"),
        (["llama3_2-1B.pte", "tokenizer.model", "params.json"], r"an ExecuTorch program \(\.pte\)"),
        (["model-Q4_K_M.gguf"], "a GGUF file"),
        (["consolidated.00.pth", "params"], r"lacks params\.json \(it is named `params` here: rename it\)"),
        (["consolidated.00.pth", "tokenizer.model"], r"lacks params\.json; fetch it beside consolidated\.00\.pth"),
        (["params.json", "tokenizer.model"], r"holds no consolidated\.NN\.pth .*; it holds params\.json, tokenizer\.model"),
        ([f"photo{i}.jpg" for i in range(9)], "holds no .* it holds photo0.jpg, .*photo7.jpg, …"),
    ],
)
def test_a_folder_that_is_not_native_is_described(tmp_path, names, says):
    path = fill(tmp_path / "folder", names)
    with pytest.raises(CheckpointError, match=says) as error:
        open_folder(path)
    assert str(error.value).startswith(f"{path} ")
    assert not isinstance(error.value, FolderNotFound)


def test_a_link_to_what_is_gone_is_named(tmp_path):
    path = fill(tmp_path, FILES[:1])
    (path / "consolidated.00.pth").symlink_to("../blobs/4d7a")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is a link to \.\./blobs/4d7a, which does not exist"):
        open_folder(path)


def test_links_to_what_is_there_serve(tmp_path):
    blobs = fill(tmp_path / "blobs")
    path = tmp_path / "snapshot"
    path.mkdir()
    for name in FILES:
        (path / name).symlink_to(blobs / name)
    assert open_folder(path).shard_bytes == len("consolidated.00.pth")


def test_folders_that_permissions_close_are_named_with_the_reason(unprivileged_folder, monkeypatch):
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(unprivileged_folder))
    root = unprivileged_folder / "checkpoints"
    inner = fill(root / "Llama3.2-1B")
    for mode, says in ((0o000, "cannot l"), (0o300, "cannot list"), (0o600, "cannot l")):
        inner.chmod(mode)
        with pytest.raises(CheckpointError, match=rf"{says}.*Llama3\.2-1B.*: Permission denied"):
            open_folder(inner)
    inner.chmod(0o700)
    root.chmod(0)
    for use in (lambda: find_folder("Llama3.2-1B"), list_folders):
        with pytest.raises(CheckpointError, match=r"checkpoints.*: Permission denied"):
            use()
    root.chmod(0o700)
    assert open_folder("Llama3.2-1B").path == inner


@pytest.mark.parametrize(
    ("names", "elsewhere", "says"),
    [
        (("params.json", "consolidated.00.pth"), None, r"lacks tokenizer\.model; fetch it, or name one with tokenizer_path"),
        (("config.json", "model.safetensors"), None, r"lacks tokenizer\.json; fetch it"),
        (
            ("config.json", "model.safetensors"),
            "original",
            r"lacks tokenizer\.json, but there is .*original/tokenizer\.model: copy",
        ),
        (("params.json", "consolidated.00.pth"), "..", r"lacks tokenizer\.model, but there is .*/tokenizer\.model: copy"),
    ],
)
def test_a_missing_tokenizer_is_named_with_where_one_is(tmp_path, names, elsewhere, says):
    path = fill(tmp_path / "Llama", names)
    if elsewhere:
        fill(path / elsewhere, ["tokenizer.model"])
    args = ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=512, norm_eps=1e-5, rope_theta=1e4, n_kv_heads=4)
    with pytest.raises(CheckpointError, match=says):
        open_folder(path).open_tokenizer(args)


def test_opening_reads_no_file(tmp_path):
    path = fill(tmp_path)
    (path / "params.json").write_text(json.dumps({"dim": "nonsense"}))
    assert open_folder(path).params.read_text() == '{"dim": "nonsense"}'
