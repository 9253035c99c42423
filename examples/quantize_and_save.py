"""Quantize a checkpoint, save it, check it, and load it.

    python examples/quantize_and_save.py FOLDER NEW_FOLDER [int8 | int4 | int4:group=32]

int4 reads a calibration text first (GPTQ), which takes minutes for a large model.
"""

import sys

from llama_ref import Llama
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.integrity import verify
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder


def main(folder: str, new_folder: str, scheme: str = "int8") -> None:
    written = quantize_folder(folder, new_folder, scheme)
    before, after = (open_folder(path).shard_bytes / 1e6 for path in (folder, written))
    print(f"{before:.0f} MB -> {after:.0f} MB in {written}")
    print(verify(written).summary())
    llama = Llama.build(written, max_seq_len=256)  # the folder says how it is quantized
    [result] = llama.text_completion(["The capital of France is"], temperature=0, max_gen_len=8)
    print(result["generation"])


if __name__ == "__main__":
    main(*sys.argv[1:])
