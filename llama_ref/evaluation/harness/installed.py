"""Check that the harness is installed, and configure its libraries before they are imported."""

import importlib.util
import logging
import os

from llama_ref.errors import RequestError
from llama_ref.evaluation.harness.hub import offline_without_hub

OTHERWISE = "pip install 'llama-ref[eval]', or pip install lm-eval==0.4.13"
FLAGS = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_harness() -> None:
    """Set the environment that the harness's libraries read on import.

    Raises RequestError if it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError(f"evaluate needs lm-evaluation-harness: {OTHERWISE}")
    for name, value in FLAGS.items():
        os.environ.setdefault(name, value)
    offline_without_hub()
    for name in ("lm_eval", "datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
