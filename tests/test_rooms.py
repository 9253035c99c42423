"""Which module may import which. Lazy imports and those for type checkers count too."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pytest

import llama_ref

PACKAGE = Path(llama_ref.__file__).parent

# The layers ("floors"), lowest first. A package ("room") may import its own floor and lower ones.
FLOORS = (
    {"args"},
    {"model", "kv_cache", "vision"},
    {"compiled", "quantization", "parallel"},
    {"decoding"},
    {"llama_ref", "generation", "session"},  # llama_ref: the package's __init__, the public names
    {"study", "bench", "guard", "evaluation"},
    {"cli", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# All other rooms (checkpoint/, tokenizer.py, device.py, ...) are outside the floors. They may
# import each other and the floors up to this one, and every floor may import them ...
HIGHEST_SEEN_FROM_BESIDE = FLOOR_OF["quantization"]
# ... but these handle files, for loading a model: nothing below generation may import them.
FILES = {"checkpoint", "plan", "download"}
LOWEST_THAT_SEES_FILES = FLOOR_OF["generation"]

# One floor, but these do not import each other.
STRANGERS = set(permutations(("study", "bench", "guard", "evaluation"), 2))

# The network: only the command line may import modules that contact servers.
NETWORK = "download"

# (importer, imported): pairs that still break a rule. When you fix one, remove it here: the tests
# fail for a pair that no longer breaks a rule.
KNOWN: set[tuple[str, str]] = set()


# ---- reading


def read_package() -> dict[str, ast.Module]:
    """Parse every module, by name in the package ("study.trace"); its __init__ is "llama_ref"."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = dotted.removesuffix("__init__").strip(".") or "llama_ref"
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[str]:
    """Yield every module that a tree imports: its name in `modules`, or another package's ("rich").

    That importing `a.b` also runs `a/__init__.py` does not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (own_name(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                inner = own_name(f"{node.module}.{alias.name}")
                outer = own_name(node.module)
                hidden = outer in modules and alias.name in bound(modules[outer])
                yield inner if inner in modules and not hidden else outer


def prints_by_itself(tree: ast.Module) -> bool:
    """Whether a tree uses `print`, or stdout or stderr other than to flush them."""
    nodes = list(ast.walk(tree))
    flushed = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "flush"}
    named = {node.id for node in nodes if isinstance(node, ast.Name)}
    named |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute) and id(node) not in flushed}
    named |= {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return not named.isdisjoint({"print", *(f"sys.{end}{name}{end}" for name in ("stdout", "stderr") for end in ("", "__"))})


def own_name(dotted: str) -> str:
    """A dotted name within the package; for other packages, its first part."""
    first, _, rest = dotted.partition(".")
    if first != "llama_ref":
        return first
    return rest if rest else "llama_ref"


def bound(tree: ast.Module) -> set[str]:
    """Names defined or imported at the top of a module: they hide submodules of the same name."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def room(module: str) -> str:
    return module.partition(".")[0]


class House(NamedTuple):
    """Every module with its tree, and pairs (importer, imported) of all imports and of those within the package."""

    modules: dict[str, ast.Module]
    imports: set[tuple[str, str]]
    own_imports: set[tuple[str, str]]
    prints: set[tuple[str, str]]  # (module, "print")


@cache
def house() -> House:
    """Read lazily, so that collecting this file takes no time."""
    modules = read_package()
    pairs = {(name, found) for name, tree in modules.items() for found in imports(tree, modules)}
    prints = {(name, "print") for name, tree in modules.items() if prints_by_itself(tree)}
    return House(modules, pairs, {(a, b) for a, b in pairs if b in modules and a != b}, prints)


# ---- rules


def goes_up(importer: str, imported: str) -> bool:
    """Whether an import goes in the wrong direction."""
    a, b = room(importer), room(imported)
    if a == b:
        return False
    if (a, b) in STRANGERS or (b == NETWORK and a != "cli"):
        return True
    below, above = FLOOR_OF.get(a), FLOOR_OF.get(b)
    if below is not None and above is not None:
        return above > below
    if below is not None:
        return b in FILES and below < LOWEST_THAT_SEES_FILES
    return above is not None and above > HIGHEST_SEEN_FROM_BESIDE


def talks(importer: str, imported: str) -> bool:
    """Whether a module outside cli/ prints, or imports what prints."""
    return room(importer) not in ("cli", "__main__") and imported in ("rich", "print")


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """One import cycle, its first module repeated at the end; empty if there is none."""
    after: dict[str, list[str]] = {}
    for a, b in sorted(edges):
        after.setdefault(a, []).append(b)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in after.get(module, ()):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    found = (walk(module, []) for module in sorted(after))
    return next(filter(None, found), [])


def wrong() -> set[tuple[str, str]]:
    """Every pair that breaks a rule by itself; cycles are checked separately."""
    upward = {pair for pair in house().own_imports if goes_up(*pair)}
    return upward | {pair for pair in house().imports | house().prints if talks(*pair)}


# ---- tests


def test_imports_go_down_and_only_the_command_line_prints():
    assert sorted(wrong() - KNOWN) == []


def test_there_is_no_circle():
    assert " -> ".join(circle(house().own_imports - KNOWN)) == ""


def test_every_known_pair_still_breaks_a_rule():
    sound = house().own_imports - KNOWN
    in_circles = {pair for pair in KNOWN & house().own_imports if circle(sound | {pair})}
    assert sorted(KNOWN - wrong() - in_circles) == [], "mended: remove these from KNOWN"


def test_a_folder_is_seen_at_a_glance():
    """One level of flat files at the top and one file per command; every other folder is split before it grows long."""
    files = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    files.pop("cli/commands")
    assert files.pop(".") <= 25
    assert {folder: n for folder, n in files.items() if n > 13} == {}


def test_tests_import_no_tests():
    """Shared helpers are in files of their own: importing a test file would run its tests twice."""
    found = [
        (path.name, line)
        for path in Path(__file__).parent.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(from|import)\s", line) and re.search(r"\btest_", line)
    ]
    assert found == []


def test_the_whole_package_is_read():
    assert (set(FLOOR_OF) | FILES) - set(map(room, house().modules)) <= {"kv_cache", "__main__"}
    assert len(house().modules) > 100 and len(house().own_imports) > 300


def test_every_module_named_in_a_string_exists():
    """No import checks names such as "llama_ref.parallel.job" in sys.modules[...]."""
    named = {
        (name, found)
        for name, tree in house().modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in re.findall(r"\bllama_ref(?:\.[a-z_]\w*)+", node.value)
    }
    assert named
    assert sorted(pair for pair in named if own_name(pair[1]) not in house().modules) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("args", "model"),
        ("model", "compiled.cpu"),
        ("quantization.apply", "decoding.loop"),
        ("decoding.loop", "generation"),
        ("generation", "study"),
        ("session", "guard.gate"),
        ("guard.judge", "study.trace"),
        ("study.trace", "cli.terminal"),
        ("bench.runner", "study.trace"),
        ("evaluation.perplexity", "bench.runner"),
        ("checkpoint.folder", "generation"),
        ("checkpoint.folder", "decoding.loop"),
        ("tokenizer", "cli"),
        ("model", "checkpoint.folder"),
        ("decoding.loop", "checkpoint.folder"),
        ("checkpoint.folder", "download.link"),
        ("generation", "download.release"),
        ("download.release", "generation"),
    ],
)
def test_what_goes_up_is_seen(importer, imported):
    assert goes_up(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("cli.commands", "bench.runner"),
        ("cli.views.plan", "plan"),
        ("cli.commands.download", "download.release"),
        ("download.release", "checkpoint.integrity"),
        ("bench.runner", "generation"),
        ("guard.judge", "generation"),
        ("guard.versions", "checkpoint.releases"),
        ("study.analyses.weights", "checkpoint.folder"),
        ("evaluation.scoring", "decoding.loop"),
        ("generation", "checkpoint.loading.loader"),
        ("decoding.loop", "compiled.cpu"),
        ("compiled.cpu", "quantization.linear"),
        ("checkpoint.loading.loader", "quantization.apply"),
        ("checkpoint.shapes", "model"),
        ("tokenizer", "checkpoint.hf.tokenizer"),
        ("model", "args"),
        ("args", "errors"),
    ],
)
def test_what_goes_down_is_fine(importer, imported):
    assert not goes_up(importer, imported)


def test_every_kind_of_import_is_seen():
    names = ("llama_ref", "model", "args", "study", "study.trace", "study.names", "cli.terminal")
    modules = dict.fromkeys(names, ast.parse(""))
    modules["study"] = ast.parse("from llama_ref.study.trace import trace")
    source = """
import os.path, llama_ref.args
from typing import TYPE_CHECKING
from llama_ref import model, Llama
from llama_ref.study import names
if TYPE_CHECKING:
    from llama_ref.cli.terminal import note
def lazy():
    from llama_ref.study import trace  # the function, not the module
    from rich.progress import Progress
"""
    own = {"args", "model", "llama_ref", "study.names", "cli.terminal", "study"}
    assert set(imports(ast.parse(source), modules)) == own | {"os", "typing", "rich"}
    assert talks("study.patching.grid", "rich") and talks("plan", "print")
    assert not talks("cli.parsing.parser", "rich") and not talks("cli.parsing.parser", "print")


@pytest.mark.parametrize(
    "source",
    ["print()", "map(print, x)", "sys.stderr.write(x)", "f(file=sys.stdout)", "from sys import stdout", "sys.__stdout__"],
)
def test_every_way_to_print_is_seen(source):
    assert prints_by_itself(ast.parse(source))
    assert not prints_by_itself(ast.parse("sys.stdout.flush(); sys.stdin.read(); report(x); process.stdout.read()"))


def test_a_circle_is_seen():
    assert circle({("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")}) == ["b", "c", "d", "b"]
    assert circle({("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}) == []
