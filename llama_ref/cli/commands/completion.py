"""`llama-ref completion`."""

from typing import Annotated, Literal

from llama_ref.cli.flags import Flag, Section, command


@command(Section.OTHER)
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Flag("bash, zsh or fish")]) -> None:
    """Print a script for completion in a shell.

    Load it in the shell's start file:

      bash  ~/.bashrc                   eval "$(llama-ref completion bash)"
      zsh   ~/.zshrc, after compinit    eval "$(llama-ref completion zsh)"
      fish  ~/.config/fish/config.fish  llama-ref completion fish | source

    The script lists what this version knows, so that completing starts no Python. Arguments are
    completed to the checkpoints under ~/.llama/checkpoints and to files.
    """
    from llama_ref.cli import commands
    from llama_ref.cli.completion import SCRIPTS

    print(SCRIPTS[shell]({name: commands.load(name) for name in commands.names()}), end="")
