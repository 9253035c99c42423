"""The errors this package raises on purpose. Each message says what was found, what was expected, where, and what to do."""


class LlamaRefError(Exception):
    """Base of all of them: `except LlamaRefError` is enough to tell a user's problem from a bug."""


class CheckpointError(LlamaRefError):
    """Something on disk is not what it should be: a folder, a shard, params.json, tokenizer.model, checklist.chk."""


class FolderNotFound(CheckpointError):
    """No folder is meant by a name or path."""


class RequestError(LlamaRefError, ValueError):
    """A call asks for what cannot be done: a prompt longer than the context, top_p above 1, an unknown role."""
