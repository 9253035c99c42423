#!/usr/bin/env bash
# Build the demo from a fresh clone and chat with it: bash scripts/demo.sh ["a question"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment demo
if [ ! -e "$demo/params.json" ]; then
    say "building $demo"
    llama-ref demo --out "$demo" >/dev/null 2>&1
fi
llama-ref verify "$demo"
echo "${1-Name three colors.}" | llama-ref chat "$demo" --temperature 0
