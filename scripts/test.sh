#!/usr/bin/env bash
# Every check, from a fresh clone:     bash scripts/test.sh [pytest's arguments]
# Style, types and the core, quickly:  bash scripts/test.sh --quick [pytest's options]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The tests of --quick take at most 90 seconds on two idle cores: the model, its text and its files,
# without comparisons to other implementations, compilers, browsers or measurements.
CORE=(
    tests/test_args.py
    tests/test_chat.py
    tests/test_community.py
    tests/test_files.py
    tests/test_generation.py::test_build_takes_metas_positional_arguments
    tests/test_generation.py::test_completions_have_metas_shape
    tests/test_generation.py::test_chat_answers_have_metas_shape
    tests/test_generation.py::test_logprobs_are_those_of_a_plain_forward
    tests/test_generation.py::test_prompts_run_in_pieces_give_the_same
    tests/test_generation.py::test_stop_strings_end_each_row_of_a_batch_by_itself
    tests/test_model.py
    tests/test_rooms.py
    tests/test_tokenizer.py
    tests/test_vocabulary.py
    tests/checkpoint/hf
    tests/checkpoint/test_attacks.py
    tests/checkpoint/test_folder.py
    tests/checkpoint/test_integrity.py
    tests/checkpoint/test_reader.py
    tests/cli/parsing/test_help.py
    tests/cli/test_outcome.py
    tests/cli/parsing/test_parser.py
    tests/decoding/test_loop.py
    tests/tools/test_functions.py
)

kind=dev tests=()
if [ "${1-}" = --quick ]; then
    kind=quick tests=("${CORE[@]}")
    shift
fi

unset PYTHONDONTWRITEBYTECODE # pytest would rewrite every test file in every run, for five seconds
environment "$kind"
cd "$root"
say "ruff check"
ruff check .
say "ruff format --check"
ruff format --check .
say "mypy, in parallel with the tests"
mypy &
types=$!
if [ "$kind" = dev ]; then browser; fi
if [ ! -e "$demo/params.json" ]; then
    say "building $demo"
    python -m llama_ref demo --out "$demo" >/dev/null
fi
say "pytest $*"
status=0
python -m pytest -n auto --dist loadfile ${tests[@]+"${tests[@]}"} "$@" || status=$? # the tests of one file share slow fixtures
wait "$types" || status=$?
exit "$status"
