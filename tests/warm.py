"""A Python that has imported torch and llama_ref, so that programs start in 5 % of the time.

A server does the imports once and forks for each program. The commands of `warm_commands`,
`python`, `llama-ref` and `torchrun`, hand it their words, folder, environment and three open files
(warm_call.py), pass on signals, and end as the program does. On systems without pidfds they are the
real commands.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMMANDS = {"python": [], "llama-ref": ["-m", "llama_ref.cli"], "torchrun": ["-m", "torch.distributed.run"]}


@contextmanager
def warm_commands(folder: Path, *prefix: str) -> Iterator[Path]:
    """Make the commands in the folder, for the block.

    `prefix` starts the server: `ip netns exec NAME`.
    """
    real = Path(sys.executable).parent
    if not hasattr(os, "pidfd_open"):
        yield real
        return
    for name, words in COMMANDS.items():
        code = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport warm_call\n"
        (folder / name).write_text(f"#!{sys.executable} -IS\n{code}warm_call.call({str(folder)!r}, {words})\n")
        (folder / name).chmod(0o755)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with subprocess.Popen([*prefix, sys.executable, __file__, folder], **options) as server:
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.stdin.close()


def serve(folder: str) -> list[str]:
    """Fork for each call; return its words in the new process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(f"{folder}/socket")
        door.listen()
        print("ready", flush=True)
        while door in select.select([door, sys.stdin], [], [])[0]:
            caller, _ = door.accept()
            if os.fork() == 0:
                return begin(caller)
            caller.close()
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    sys.exit()


def begin(caller: socket.socket) -> list[str]:
    """Become the called program; a process in between reports its end and passes signals on."""
    request, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    if (program := os.fork()) == 0:
        for at, file in enumerate(files):
            os.dup2(file, at)
            os.close(file)
        caller.close()
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        words, here, environment = eval(request.decode("utf-8", "surrogateescape"))
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = os.environ["PYTHON_EXEC"] = f"{sys.argv[1]}/python"  # what it starts need not import torch either
        return words
    for file in files:
        os.close(file)
    end = os.pidfd_open(program)
    while end not in select.select([caller, end], [], [])[0]:
        number = caller.recv(1)  # nothing if the command was killed
        os.kill(program, number[0] if number else signal.SIGKILL)
        if not number:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with suppress(BrokenPipeError):  # the command was killed
        caller.send(b"%d" % code)
    os._exit(0)


def run(words: list[str]) -> None:
    """Do in this process what `python` does with these arguments."""
    import runpy
    import types

    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    kind, *sys.argv = words
    sys.path[0] = str(Path.cwd())
    if kind == "-c":
        sys.path[0], code, sys.argv[0] = "", sys.argv[0], "-c"
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.modules.pop(sys.argv[0], None)  # else runpy warns
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, kind)
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def leave() -> None:
    """Exit without freeing imported modules, which takes Python a tenth of a second."""
    with suppress(OSError):  # which Python itself then tells
        sys.stdout.flush()
        if CODE:
            os._exit(CODE[0])


CODE: list[int] = []

if __name__ == "__main__":
    import atexit
    import gc
    import importlib
    import pkgutil

    atexit.register(leave)  # the first to be registered is the last to be called

    import llama_ref.cli

    modules = [each.name for each in pkgutil.walk_packages(llama_ref.cli.__path__, "llama_ref.cli.")]
    for name in ("fire", "torch.distributed.run", "llama_ref.generation", *modules):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    gc.freeze()
    try:
        run(serve(sys.argv[1]))
        CODE.append(0)
    except SystemExit as exit:
        CODE.extend([exit.code or 0] if isinstance(exit.code, int | None) else [])
        raise
