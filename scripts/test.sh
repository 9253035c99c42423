#!/usr/bin/env bash
# From a bare clone, every check: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment dev
cd "$root"
say "ruff check"
ruff check .
say "ruff format --check"
ruff format --check .
browser
if [ ! -e "$demo/params.json" ]; then
    say "building $demo"
    python scripts/make_demo_checkpoint.py >/dev/null
fi
say "pytest $*"
python -m pytest -n auto --dist loadfile "$@" # a file's tests share what takes long to make
