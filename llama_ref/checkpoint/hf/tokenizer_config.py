"""Hugging Face's `tokenizer_config.json`: special tokens, context length and chat template."""

from typing import Any

from llama_ref.checkpoint.hf.chat_template import chat_template
from llama_ref.vocabulary import Vocabulary


def tokenizer_config(
    vocabulary: Vocabulary,
    max_seq_len: int,
    *,
    instruct: bool = True,
    eos_token: str | None = None,
    template: str | None = None,
    images: bool = False,
) -> dict[str, Any]:
    """The content of tokenizer_config.json, which accompanies tokenizer.json.

    As in Meta's own releases, an instruct model ends its turns with eot_id and has a chat template;
    a base model ends with end_of_text and has none. `eos_token` and `template` override these for a
    model that has its own. `images`: it is a vision model.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.special_text("<|begin_of_text|>"),
        "eos_token": eos_token or vocabulary.special_text("<|eot_id|>" if instruct else "<|end_of_text|>"),
        "pad_token": vocabulary.special_text("<|finetune_right_pad_id|>"),
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if images:
        config["processor_class"] = "MllamaProcessor"
    return config | ({"chat_template": template or chat_template(vocabulary, images=images)} if instruct else {})
