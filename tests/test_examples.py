"""Every file in examples/ runs on the demo and shows what it claims."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPOSITORY
from llama_ref.checkpoint.folder import open_folder
from llama_ref.formatting import human_bytes
from llama_ref.generation import Llama
from llama_ref.plan import Workload, find_model, plan
from scripted import scripted

EXAMPLES = REPOSITORY / "examples"
NOTEBOOK = EXAMPLES / "colab.ipynb"
LONGEST = 30  # lines of an example: half a screen
COUNTRIES = ("France", "Italy")

T4_GB = 15  # of a T4's 16, as CUDA reports them
COLAB = {"max_seq_len": 2048, "max_batch_size": 1}  # as the notebook loads the model


@pytest.fixture(scope="module")
def run(warm) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an example as a user does: in the repository, as a script."""

    def run(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [warm / "python", EXAMPLES / name, *words]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=300, check=False)

    return run


@pytest.fixture(scope="module")
def output(run) -> Callable[..., str]:
    """What an example prints."""

    def output(name: str, *words: str | Path) -> str:
        done = run(name, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return output


# ---- scripts


def test_complete_prints_the_prompt_and_what_follows(run, demo_folder):
    done = run("complete.py", demo_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris")
    assert re.search(r"\[\d+ tokens, ended by (stop|length)\]", done.stderr)


def test_complete_takes_another_prompt(output, demo_folder):
    assert output("complete.py", demo_folder, "The opposite of hot is").startswith("The opposite of hot is cold")


def test_chat_computes_only_the_new_tokens_of_a_turn(run, demo_folder):
    done = run("chat.py", demo_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("> What is the capital of France?\n") and "Paris" in done.stdout
    cached = re.findall(r"\[(\d+) of (\d+) prompt tokens were cached\]", done.stderr)
    (first, _), (second, of_all) = [(int(a), int(b)) for a, b in cached]
    assert first == 0 and 0 < second < of_all
    assert "5 messages: system, user, assistant, user, assistant" in done.stderr


def test_a_model_calls_a_function(output, demo_folder, shallow, monkeypatch, capsys):
    """`tools.py`: the demo answers without tools; a model's calls are handled, also bad ones."""
    assert output("tools.py", demo_folder).startswith("17 * 23 = ")
    answers = [
        "[multiply(a=17, b='23'), multiply(a='import os', b=1), multiply(a=1)]<|eot_id|>",
        '<|python_tag|>__import__("os").abort()<|eom_id|>',
        "It is 391.<|eot_id|>",
    ]
    llama = scripted(shallow, answers, monkeypatch)
    monkeypatch.setattr(Llama, "build", lambda *words, **options: llama)
    monkeypatch.setattr(sys, "argv", ["tools.py", "any"])
    dialog = runpy.run_path(str(EXAMPLES / "tools.py"))["dialog"]
    *calls, last = capsys.readouterr().out.splitlines()
    results = [message["content"] for message in dialog if message["role"] == "tool"]
    assert [call.endswith(f": {result}") for call, result in zip(calls, results, strict=True)] == [True] * 4
    assert results[0] == "391.0" and results[1].startswith("error: ValueError") and results[2].startswith("error: TypeError")
    assert results[3] == "error: KeyError('code_interpreter')" and last == "It is 391."


def test_scores_tell_a_likely_sentence_from_an_unlikely_one(output, demo_folder):
    lines = output("batch_logprobs.py", demo_folder, "The sky is blue.", "Blue sky the is.").splitlines()
    likely, unlikely = (float(line.split()[0]) for line in lines)
    assert 1 < likely < unlikely / 2


def test_scores_of_a_batch_are_those_of_each_text(output, demo_folder):
    together = output("batch_logprobs.py", demo_folder).splitlines()
    alone = output("batch_logprobs.py", demo_folder, "서울은 한국의 수도이다.").splitlines()
    assert len(together) == 3 and "서울" in together[2]
    a, b = (float(line.split()[0]) for line in (together[2], alone[0]))
    assert a == pytest.approx(b, rel=0.03)  # bfloat16, with another order of summation


def test_verify_tells_a_whole_folder_from_a_damaged_one(run, output, demo_folder, tmp_path):
    assert "\nall 3 files are sound" in output("verify_folder.py", demo_folder, "--quick")
    broken = tmp_path / "broken"
    shutil.copytree(demo_folder, broken, ignore=shutil.ignore_patterns("*.pth"))
    done = run("verify_folder.py", broken)
    assert done.returncode == 1
    assert re.search(r"missing +consolidated\.00\.pth", done.stdout) and "fetch it" in done.stderr


def test_a_patched_head_changes_the_answer(output, demo_folder):
    text = output("attention_patch.py", demo_folder)
    found = re.findall(r"(unchanged|zeroed|swapped): +Paris ([\d.]+)%, +Rome ([\d.]+)%", text)
    paris, rome = ({what: float(row[i]) for what, *row in found} for i in (0, 1))
    assert paris["unchanged"] > 70 > paris["zeroed"] > paris["swapped"]
    assert rome["swapped"] > 40 > rome["unchanged"]


def test_a_quantized_folder_is_half_as_large_and_loads(output, demo_folder, tmp_path):
    text = output("quantize_and_save.py", demo_folder, tmp_path / "int8")
    before, after = map(int, re.match(r"(\d+) MB -> (\d+) MB", text).groups())
    assert 0.45 < after / before < 0.55
    assert "all 3 files are whole" in text and "Paris" in text
    assert open_folder(tmp_path / "int8").is_quantized


# ---- the web app


@pytest.fixture(scope="module")
def web_app(warm, demo_folder) -> Iterator[str]:
    """The address of a server, started as a user does, on a free port."""
    command = [warm / "python", EXAMPLES / "web_app.py", demo_folder, "0"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, encoding="utf-8") as server:
        for line in server.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        threading.Thread(target=server.stderr.read, daemon=True).start()  # its log must not fill the pipe
        yield found[1]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


def ask(address: str, **question: object) -> str:
    request = urllib.request.Request(f"{address}/chat", json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def test_clients_that_ask_at_once_get_what_each_gets_alone(web_app):
    """`web_app.py`: greedy answers in bfloat16, eight at a time, and one that is aborted."""
    capitals = [{"text": f"What is the capital of {country}?", "temperature": 0, "max_gen_len": 8} for country in COUNTRIES]
    sampled = [{"text": "Tell me a story.", "seed": seed, "max_gen_len": 8} for seed in (1, 2)]
    questions = [*capitals, *sampled]
    alone = [ask(web_app, **question) for question in questions]
    assert "Paris" in alone[0] and alone[-1] != alone[-2]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(lambda question: ask(web_app, **question), questions * 2)) == alone * 2


def test_the_web_app_says_what_is_wrong_with_a_question(web_app):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(web_app, text="Hi", temperature=-1)
    assert refused.value.code == 400
    assert json.load(refused.value)["detail"].startswith("temperature is -1.0, expected a number from 0")


# ---- the notebook


@pytest.fixture(scope="module")
def executed(warm, demo_folder, tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook after running in a kernel with the demo instead of the download."""
    scratch = tmp_path_factory.mktemp("colab")
    settings = {
        name: str(scratch / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    settings["LLAMA_REF_FOLDER"] = str(demo_folder)
    settings["HF_HUB_OFFLINE"] = "1"
    settings["PATH"] = f"{warm}{os.pathsep}{os.environ['PATH']}"
    settings["PYTHONPATH"] = str(REPOSITORY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(sys, "executable", str(warm / "python"))  # the kernel's
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        for cell in notebook.cells:
            cell.source = cell.source.replace("max_gen_len=256", "max_gen_len=16")
        resources = {"metadata": {"path": str(scratch)}}
        return NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()


def printed(notebook: nbformat.NotebookNode, beginning: str) -> str:
    """The output of the code cell whose source contains this text."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and beginning in cell.source]
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_answers_on_the_demo(executed):
    assert "all 3 files are sound" in printed(executed, "verify(folder")
    assert re.search(r"before: .+\n.*100%\nafter: ", printed(executed, "Llama.build"), re.DOTALL)
    answer = printed(executed, "llama.stream")
    n_tokens = int(re.search(r"(\d+) tokens in [\d.]+ s, ended by (stop|length)", answer)[1])
    assert 0 < n_tokens <= 16 and "GPU memory:" in answer


def test_the_notebook_says_that_it_fits_a_t4(executed):
    text = printed(executed, "llama-ref plan")
    assert "float16: 1 card is enough" in text
    model = find_model("Llama-3-8B-Instruct", "int4")
    placement = plan(model, Workload(T4_GB, **COLAB), ["float16"])[0]
    assert placement.layout.processes == 1 and placement.fits
    said = re.search(r"estimated to take ([\d.]+) GB", NOTEBOOK.read_text(encoding="utf-8"))[1]
    assert said in text.split() and human_bytes(placement.need.total) == f"{said} GB"


def test_the_notebook_is_as_people_run_it():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    source = "\n".join(cell.source for cell in notebook.cells)
    for setting in ('allow_patterns="original/*"', 'quantize="int4"', "max_gen_len=256", "temperature=0.6"):
        assert setting in source
    assert "top_p=0.9" in source and re.search(r'"role": "system", "content": "[^"]*[가-힣]', source)
    for name, value in COLAB.items():
        assert f"{name}={value}" in source and f"--{name} {value}" in source
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before a commit"


# ---- all of them


def test_examples_are_short_and_each_is_run_here():
    own = Path(__file__).read_text(encoding="utf-8")
    files = sorted(path for path in EXAMPLES.iterdir() if path.is_file())
    assert len(files) >= 7
    assert [path.name for path in files if f'"{path.name}"' not in own] == []
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert [name for name, lines in lengths.items() if lines > LONGEST] == []
