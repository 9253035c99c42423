"""Parsing of command lines: forms of flags, misuse, suggestions."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest

from conftest import exit_code
from llama_ref.cli import commands
from llama_ref.cli.parsing.flags import Flag, command
from llama_ref.cli.parsing.parser import parse, run
from llama_ref.errors import RequestError


@dataclass(frozen=True)
class Group:
    """Flags that commands share."""

    heading: ClassVar[str] = "Shared"

    top_p: Annotated[float, Flag("a number")] = 0.9
    mode: Annotated[Literal["auto", "never"], Flag("a choice", aliases={"no": "never"})] = "auto"


CALLS: list[dict[str, Any]] = []


@command()
def sample(
    name: str,
    prompt: str | None = None,
    *,
    count: Annotated[int | None, Flag("how many", short="n")] = None,
    echo: Annotated[bool, Flag("a switch", short="e")] = False,
    calibrate: Annotated[bool, Flag("a switch that is on")] = True,
    chat: Annotated[bool | None, Flag("a switch of three states")] = None,
    text: str | None = None,
    group: Group,
) -> int | None:
    """Record the arguments of the call."""
    CALLS.append(dict(locals()))
    if name == "refused":
        raise RequestError(f"{text} is wrong, expected another")
    return 1 if name == "bad" else None


@pytest.fixture
def called(capfd) -> Callable[..., dict[str, Any]]:
    """Return the function's arguments for a command line."""

    def called(*words: str) -> dict[str, Any]:
        CALLS.clear()
        assert run(sample, list(words)) == 0
        assert capfd.readouterr() == ("", "")
        (call,) = CALLS
        return call

    return called


DEFAULTS = {
    "name": "x",
    "prompt": None,
    "count": None,
    "echo": False,
    "calibrate": True,
    "chat": None,
    "text": None,
    "group": Group(),
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("x", {}),
        ("--name x", {}),
        ("--name=x", {}),
        ("x y", {"prompt": "y"}),
        ("--prompt y x", {"prompt": "y"}),
        ("y --name x", {"prompt": "y"}),
        ("x --top_p 0.5", {"group": Group(0.5)}),
        ("--top-p=.5 x", {"group": Group(0.5)}),
        ("-top_p 1 x", {"group": Group(1.0)}),
        ("x --mode never", {"group": Group(mode="never")}),
        ("x --mode=no", {"group": Group(mode="never")}),
        ("x --count 3", {"count": 3}),
        ("x --count -3", {"count": -3}),
        ("x -n 3", {"count": 3}),
        ("x -n=3", {"count": 3}),
        ("x --count 3 --count 4", {"count": 4}),
        ("x --count None", {"count": None}),
        ("x --count none", {"count": None}),
        ("x --count=null", {"count": None}),
        ("--echo x", {"echo": True}),
        ("-e x y", {"echo": True, "prompt": "y"}),
        ("--echo True x", {"echo": True}),
        ("x --echo=yes", {"echo": True}),
        ("x --echo=0", {"echo": False}),
        ("x --nocalibrate", {"calibrate": False}),
        ("x --no-calibrate", {"calibrate": False}),
        ("x --no_calibrate y", {"calibrate": False, "prompt": "y"}),
        ("x --calibrate=false", {"calibrate": False}),
        ("x --chat", {"chat": True}),
        ("x --nochat", {"chat": False}),
        ("x --text 42", {"text": "42"}),
        ("x --text=--echo", {"text": "--echo"}),
        ("x --text=", {"text": ""}),
        ("x --text=a=b", {"text": "a=b"}),
        ("x --text -", {"text": "-"}),
        ("x -", {"prompt": "-"}),
        ("x -5", {"prompt": "-5"}),
        ("-- x --echo", {"prompt": "--echo"}),
        ("x --echo -- -e", {"prompt": "-e", "echo": True}),
    ],
)
def test_flags_are_written_as_fire_takes_them(called, words, expected):
    assert called(*words.split()) == DEFAULTS | expected


@pytest.mark.parametrize(
    "prompt",
    ["- an item", "--- a title", "-not a flag", "--a b", "None", "1e3", "[1]", "'q'", "--", "", "\n"],
)
def test_a_text_is_a_text_whatever_it_looks_like(called, prompt):
    words = ["x", "--", prompt] if prompt == "--" else ["x", prompt]
    assert called(*words)["prompt"] == prompt
    assert called("x", f"--text={prompt}")["text"] == prompt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "missing NAME (see script --help)"),
        ("--ecko x", "unknown flag --ecko; did you mean --echo? (see script --help)"),
        ("x --topp 1", "unknown flag --topp; did you mean --top_p? (see"),
        ("x -t 1", "unknown flag -t; put a text that begins with a dash last, after -- (see"),
        ("x --zzz", "unknown flag --zzz; put a text that begins with a dash"),
        ("x -- -five -n", "unexpected argument '-n'; flags go before -- (see"),
        ("x y z", "unexpected argument 'z'; put a text of several words in quotes (see"),
        ("x --name y z", "unexpected argument 'z'"),
        ("x --text", "--text needs a value: --text TEXT"),
        ("x --text --echo", "--text needs a value: --text TEXT, or --text=TEXT where"),
        ("x -n", "-n needs a value: -n INT"),
        ("x --count many", "--count is 'many', expected a whole number or none"),
        ("x --count 1.5", "--count is '1.5', expected a whole number"),
        ("x --count True", "--count is 'True', expected a whole number"),
        ("x --top_p None", "--top_p is 'None', expected a number"),
        ("x --top_p 1" + "0" * 400, "--top_p is '1000"),
        ("x --mode nevr", "--mode is 'nevr', expected auto or never; did you mean never?"),
        ("x --echo=perhaps", "--echo is 'perhaps', expected true or false, or --echo alone"),
        ("x --noecho=1", "--noecho takes no value; write --echo=1"),
        ("x --nocount", "unknown flag --nocount; did you mean --count?"),
    ],
)
def test_misuse_is_one_line_and_2(words, message, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/script"])
    assert run(sample, words.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"llama-ref: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "shown"), [("group", "group"), ("count", "--count"), ("name", "name"), ("mode", "--mode"), ("a b", "a b")]
)
def test_an_argument_that_the_library_names_is_shown_as_the_flag_it_is(argument, shown, capfd):
    assert run(sample, ["refused", f"--text={argument}"]) == 2
    assert capfd.readouterr().err == f"llama-ref: {shown} is wrong, expected another\n"


@command()
def listing(name: str) -> None:
    """A command that takes no text."""


def test_a_command_without_a_text_gets_no_advice_about_one(capfd):
    assert run(listing, ["--zzz"]) == 2
    assert re.fullmatch(r"llama-ref: unknown flag --zzz \(see .* --help\)\n", capfd.readouterr().err)


def test_what_a_function_returns_is_the_exit_code(capfd):
    assert run(sample, ["bad"]) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lits", "unknown command 'lits'; did you mean list? (see llama-ref --help)"),
        ("compleet x", "unknown command 'compleet'; did you mean complete? (see"),
        ("zzz", "unknown command 'zzz' (see llama-ref --help)"),
        ("--versoin", "unknown flag --versoin; did you mean --version?"),
        ("--json list", "unknown flag --json; flags go after a command (see llama-ref --help)"),
        ("help lits", "unknown command 'lits'; did you mean list?"),
        ("lens x", "missing PROMPT, text for the model to read (see llama-ref lens --help)"),
        ("reshard a b", "missing --shards INT, number of shards"),
        ("complete n a b", "unexpected argument 'b'; put a text of several words in quotes"),
        ("list x", "unexpected argument 'x' (see llama-ref list --help)"),
        ("checksum x --algorithm md6", "--algorithm is 'md6', expected md5 or sha256; did you"),
        ("complete x --encoding cp94", "--encoding is 'cp94', expected an encoding such as cp949 (Korean Windows), cp1252"),
        ("collect x t --names a --to b --positions lsat", "--positions is 'lsat', expected last, all, or numbers such as"),
        ("spectra x --to innt8", "--to is 'innt8', expected int8, int4 or int4:group=N, with N one of 32, 64, 128, 256; did"),
        ("verify", "missing NAME, a checkpoint folder or release name; or give --all"),
        ("verify x --all", "--all checks every checkpoint: leave out 'x', or --all"),
    ],
)
def test_a_mistyped_line_gets_a_suggestion(words, message, capsys):
    assert exit_code(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"llama-ref: {message}") and err.count("\n") == 1


SHORTS = [(name, short, parameter) for name in commands.names() for short, parameter in commands.load(name).shorts.items()]


@pytest.mark.parametrize(("name", "short", "parameter"), SHORTS, ids=lambda value: str(value)[:20])
def test_every_short_flag_does_what_its_long_one_does(name, short, parameter):
    chosen = commands.load(name)
    required = [
        f"--{each.name}={each.choices[0] if each.choices else 1}"
        for each in chosen.parameters.values()
        if each.is_required and each.name != parameter.name
    ]
    value = [] if parameter.is_switch else [parameter.choices[0] if parameter.choices else "4"]
    by_short = parse(chosen, [*required, f"-{short}", *value], name)
    by_long = parse(chosen, [*required, f"--{parameter.name}", *value], name)
    assert by_short == by_long and parameter.name in by_short


def test_complete_q_is_quantize():
    words = ["x", "y", "-q", "int4"]
    assert parse(commands.load("complete"), words, "complete")["quantize"] == "int4"


@pytest.mark.parametrize("name", commands.names())
def test_every_command_declares_help_for_every_flag(name):
    chosen = commands.load(name)
    assert chosen.function.__module__.endswith(f".{name}")
    assert len(chosen.summary) > 10
    assert [each.name for each in chosen.parameters.values() if not each.flag.help] == []
    assert set(chosen.shorts) <= set(chosen.parameters) | set("abcdefgijklmnopqrstuvwxyz")


def test_mistakes_in_a_declaration_are_told_to_its_author():
    def twice(a: Annotated[int, Flag("", short="x")], b: Annotated[int, Flag("", short="x")]):
        """Declare one letter twice."""

    def strange(a: dict[str, int]):
        """Take a value that no word gives."""

    def doubled(*, top_p: int = 1, group: Group):
        """Declare a flag that a group has too."""

    with pytest.raises(TypeError, match="short flag twice"):
        _ = command()(twice).shorts
    with pytest.raises(TypeError, match=r"a: dict\[str, int\] needs Flag\(read=...\)"):
        _ = command()(strange).parameters
    with pytest.raises(TypeError, match="doubled declares top_p twice"):
        _ = command()(doubled).parameters


def test_a_reader_of_its_own_may_refuse():
    def read(word: str) -> list[str]:
        if not word:
            raise RequestError("--words is empty")
        return word.split(",")

    @command()
    def own(*, words: Annotated[list[str] | None, Flag("words", read=read)] = None) -> None:
        """Split words."""

    assert parse(own, ["--words", "a,b"], "own") == {"words": ["a", "b"]}
    with pytest.raises(RequestError, match="--words is empty"):
        parse(own, ["--words="], "own")


@pytest.mark.parametrize(
    "name", ["complete", "chat", "bench", "lens", "attention", "attribute", "patch", "norms", "ablate", "spectra", "quantize"]
)
def test_every_command_that_computes_takes_threads(name):
    parameter = commands.load(name).parameters["threads"]
    assert parameter.read("3") == 3 and parameter.read("none") is None
    for bad in ("0", "-1", "1.5", "many", "1025", "9" * 30):
        with pytest.raises(RequestError, match=r"--threads is .*, expected a whole number from 1 to 1,024"):
            parameter.read(bad)
