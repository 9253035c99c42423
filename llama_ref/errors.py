"""The errors this package raises. Each message says what is wrong, where, what was expected, what to do."""


class LlamaRefError(Exception):
    """Base of all of them: `except LlamaRefError` tells a user's problem from a bug."""


class CheckpointError(LlamaRefError):
    """Something on disk is not what it should be: a folder, a shard, params.json, tokenizer.model, checklist.chk."""


class UnsupportedModel(CheckpointError):
    """A model that is not a Llama 3, or is stored in a way that is not read; its files may be whole."""


class FolderNotFound(CheckpointError):
    """No checkpoint folder for a name or path."""


class RequestError(LlamaRefError, ValueError):
    """A call that cannot be carried out: a prompt longer than the context, top_p above 1, an unknown role."""


class JobError(LlamaRefError):
    """Processes of one job that cannot work together: other files or options, or one that is gone."""


class DownloadError(LlamaRefError):
    """A download that cannot be finished now. What has arrived stays for the next try."""
