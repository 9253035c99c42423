"""The errors that this package raises.

Messages say what is wrong, where, what was expected, what to do.
"""


class LlamaRefError(Exception):
    """Base class of these errors: `except LlamaRefError` separates a user's errors from bugs."""


class CheckpointError(LlamaRefError):
    """A fault of a checkpoint: its folder, a shard, params.json, tokenizer.model, checklist.chk."""


class UnsupportedModel(CheckpointError):
    """A model that is not a Llama 3 or has an unsupported format; its files may be intact."""


class FolderNotFound(CheckpointError):
    """No checkpoint folder for a name or path."""


class RequestError(LlamaRefError, ValueError):
    """A call that cannot be carried out: a prompt longer than the context, top_p above 1, an unknown role."""


class JobError(LlamaRefError):
    """A parallel job whose processes have different files or options, or have lost a process."""


class DownloadError(LlamaRefError):
    """A download that cannot be finished now.

    The data received so far is kept for the next attempt.
    """
