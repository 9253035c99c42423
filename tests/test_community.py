"""CONTRIBUTING, SECURITY, CHANGELOG and .github are true of this repository."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import llama_ref
from conftest import REPOSITORY

PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PACKAGE = Path(llama_ref.__file__).parent
GITHUB = REPOSITORY / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
FORM_PARTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


# ---- pages


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(page))
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page):
    roots = "|".join(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = re.findall(rf"(?<![\w./-])(?:{roots})/[\w./-]+\.(?:py|sh|txt|md|ipynb)", text_of(page))
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_the_places_that_contributing_names_exist():
    named = re.findall(r"`((?:cli|study|checkpoint|decoding|bench)/[\w/]*)`", text_of("CONTRIBUTING.md"))
    assert len(named) > 4 and [path for path in named if not (PACKAGE / path).exists()] == []


def test_every_test_that_security_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text_of("SECURITY.md"))
    assert len(named) > 20 and "::" not in re.sub(r"`tests/[\w/]+\.py::test_\w+`", "", text_of("SECURITY.md"))
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in text_of(file)]
    assert missing == []


def test_the_version_has_its_place_in_the_changelog():
    version = llama_ref.__version__
    sections = re.findall(r"^## \[(.+?)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "Unreleased" and version in sections


# ---- what SECURITY.md says of the whole package


def test_the_package_unpickles_nothing():
    """No pickle is read, nothing is evaluated and no template rendered, in any module."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = unsafe_names(node)
            found += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in names]
    assert found == []


UNSAFE_MODULES = {"_pickle", "dill", "jinja2", "joblib", "marshal", "runpy", "shelve", "yaml"}
UNSAFE_NAMES = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "torch.hub.load"),
    *("np.load", "numpy.load", "eval", "exec", "compile", "__import__"),
}


def unsafe_names(node: ast.AST) -> list[str]:
    """Names in a syntax node that could execute a file's content. Writing a pickle is allowed."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name for name in names if name in UNSAFE_NAMES or name.partition(".")[0] in UNSAFE_MODULES]
    if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
        return [ast.unparse(node)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_NAMES:
        return [node.func.id]
    return []


@pytest.mark.parametrize(
    "code",
    ["pickle.loads(data)", "from pickle import loads", "load = torch.load", "eval(text)", "import jinja2.sandbox"],
)
def test_what_may_run_a_file_is_seen(code):
    assert any(unsafe_names(node) for node in ast.walk(ast.parse(code)))


def test_what_is_like_it_is_not():
    source = "model.eval()\nre.compile(x)\ntorch.compile(x)\nimport json, pickle\njson.load(file)\npickle.Pickler(file)"
    assert [name for node in ast.walk(ast.parse(source)) for name in unsafe_names(node)] == []


# ---- .github


def workflow() -> dict:
    return yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text(encoding="utf-8"))


def test_the_workflow_tries_every_python_that_is_allowed():
    pythons = workflow()["jobs"]["all"]["strategy"]["matrix"]["python"]
    oldest = re.search(r"^python_requires = >=(3\.\d+)$", text_of("setup.cfg"), re.MULTILINE)[1]
    assert pythons[0] == oldest and pythons == [f"3.{minor}" for minor in range(10, 10 + len(pythons))]


def test_what_the_workflow_runs_is_there():
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    scripts = {word for step in steps for word in shlex.split(step.get("run", "")) if word.endswith(".sh")}
    assert scripts == {"scripts/test.sh"}
    assert all((REPOSITORY / script).exists() for script in scripts)


def test_the_oldest_torch_is_pinned_as_setup_cfg_allows_it(tmp_path):
    (step,) = [s for s in workflow()["jobs"]["oldest-torch"]["steps"] if "Pin torch" in s.get("name", "")]
    (tmp_path / "scripts").mkdir()
    for name in ("setup.cfg", "scripts/constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    oldest = re.search(r"^ +torch >= (.+)$", text_of("setup.cfg"), re.MULTILINE)[1]
    assert done.returncode == 0 and done.stdout == f"torch=={oldest}.*\n"
    before = text_of("scripts/constraints.txt").splitlines()
    after = (tmp_path / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    gone = set(before) - set(after)
    assert {line.partition("==")[0] for line in gone} == {"torch", "sympy"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled"}
        return
    assert form["name"] and form["description"]
    assert {part["type"] for part in form["body"]} <= FORM_PARTS
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_there_is_a_form_for_each_kind_of_issue():
    assert {path.stem for path in FORMS} == {"config", "bug", "wrong-output", "feature"}
