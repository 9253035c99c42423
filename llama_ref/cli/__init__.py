"""The command line, `llama-ref`."""


def main(argv: list[str] | None = None) -> int:
    """Run `llama-ref` with these arguments (default: the process's); return the exit code."""
    import sys

    from llama_ref.cli.interrupt import exit_on_interrupt

    if argv is None:  # a program that calls main() with arguments continues afterwards
        exit_on_interrupt()
    from llama_ref.cli.parsing.parser import run_guarded, run_program

    words = sys.argv[1:] if argv is None else argv
    return run_guarded(lambda: run_program(words))
