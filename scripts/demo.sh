#!/usr/bin/env bash
# From a bare clone to a model that talks: bash scripts/demo.sh ["prompt"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment demo
if [ ! -e "$demo/params.json" ]; then
    say "building $demo"
    python "$root/scripts/make_demo_checkpoint.py" >/dev/null
fi
llama-ref verify "$demo"
llama-ref complete "$demo" "${1-The capital of France is}" --echo --max_gen_len 64 --temperature 0
