"""Convert a checkpoint: to another number of shards, to Hugging Face's format, or back to Meta's.

Tensors are copied some rows at a time, so memory stays near the size of one tensor. The weights
stay bit for bit the same, unless another dtype is requested.
"""

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ref.args import N_LEARNABLE, ModelArgs, usual_rope_factor
from llama_ref.checkpoint.folder import CheckpointFolder, open_folder, shard_name
from llama_ref.checkpoint.formats.atomic import new_folder, write_params, write_sums
from llama_ref.checkpoint.formats.lazy_tensor import BLOCK_BYTES, LazyTensor
from llama_ref.checkpoint.formats.pth_writer import write_pth
from llama_ref.checkpoint.formats.safetensors_writer import write_safetensors
from llama_ref.checkpoint.hf.chat_template import chat_template
from llama_ref.checkpoint.hf.config import make_config, make_generation_config, make_params, one_or_several
from llama_ref.checkpoint.hf.conventions import (
    GENERATION_CONFIG,
    TEMPLATE_FILE,
    chat_template_of,
    end_ids,
    foreign_template,
    read_settings,
)
from llama_ref.checkpoint.hf.layout import to_hf
from llama_ref.checkpoint.hf.names import is_rotated
from llama_ref.checkpoint.hf.tokenizer import write_tokenizer_json
from llama_ref.checkpoint.hf.tokenizer_config import tokenizer_config
from llama_ref.checkpoint.hf.vision.config import SECTIONS, make_vision_config
from llama_ref.checkpoint.hf.vision.image_token import with_image_last
from llama_ref.checkpoint.hf.vision.preprocessor_config import make_preprocessor_config
from llama_ref.checkpoint.loading.first_load import Verify, verified
from llama_ref.checkpoint.meta_quantized.dequantized import Dequantized, open_weights
from llama_ref.checkpoint.meta_quantized.kinds import Kind
from llama_ref.checkpoint.reader import Stored
from llama_ref.checkpoint.shapes import EMBEDDING, OUTPUT, expected_shapes, name_in_shards
from llama_ref.checkpoint.verify.presence import INDEX_NAME, ONE_FILE, PREPROCESSOR_CONFIG, checkpoint_files, stamp_of
from llama_ref.checkpoint.writing.carried_files import carried_files, copy_carried, read_carried
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import dtype_name
from llama_ref.opened_files import Opened, watch_opened
from llama_ref.parallel.sharding import WHOLE, Share, is_shared, kv_heads, part_shape, shard_ranges, split_dim
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.tokenizer import Tokenizer
from llama_ref.vocabulary import ADDED_TOKENS, write_tokenizer_model

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9  # the usual size of Hugging Face's files
BASE_MODEL = re.compile(r"(Meta-)?Llama-?3(\.[0-9])?-[0-9]+B(-Vision)?(-bf16-mp[0-9]+)?")


def to_meta(
    source: str | Path,
    target: str | Path,
    *,
    shards: int | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    verify: Verify = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a folder in Meta's format: params.json, .pth shards, tokenizer.model, checklist.chk.

    End-of-text ids and a chat template that are not Llama 3's are kept in generation_config.json
    and chat_template.jinja, where every command and `to_hugging_face` find them.
    `shards` must divide every matrix evenly (default: the source's number; 1 for Hugging Face's
    format). With more shards than key/value heads, the heads are repeated and params.json counts
    the repeats, as in Meta's files for 16 processes; with fewer, the repeats are removed. `dtype`
    None keeps each tensor's dtype. `verify` is as in `Llama.build`: the source is checked because
    the new checklist would hide its damage. `progress` counts bytes.

    Raises RequestError for an impossible number of shards or an existing `target`; CheckpointError
    for a source that cannot be read, is damaged or changes while it is read, for values that
    `dtype` cannot hold, and for a target that cannot be written.
    """
    opened = Source.open(source)
    shards = opened.n_shards if shards is None else shards
    args = opened.args_in(shards)
    parts = [opened.in_metas_format(opened.tensors(Share(n, shards), dtype)) for n in range(shards)]
    written = ProgressCounter(sum(tensor.nbytes for tensors in parts for tensor in tensors), progress)
    with new_folder(target, force=force, n_bytes=written.total) as folder, opened.unchanged(verify):
        _write_params(folder, opened, args)
        write_native_tokenizer(folder, opened)
        write_conventions(folder, opened)
        for n, tensors in enumerate(parts):
            aliases = {name_in_shards(OUTPUT, args): name_in_shards(EMBEDDING, args)} if opened.stored.tied else {}
            write_pth(folder / shard_name(n), tensors, aliases, written.advance)
        write_sums(folder, checkpoint_files(folder))
    return Path(target)


def to_hugging_face(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    chat: bool | None = None,
    force: bool = False,
    verify: Verify = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write a folder in Hugging Face's format: config, tokenizer with chat template, safetensors.

    No file holds more than `max_shard_bytes` of weights, unless one tensor is larger. `dtype` None
    keeps each tensor's dtype. `chat`: the model is trained to chat (default: yes, unless its name
    is that of one of Meta's base models, or its source had no chat template). A source in this
    format keeps its config and tokenizer. Raises as `to_meta` does.
    """
    opened = Source.open(source)
    if opened.keeps_configs and chat is not None:
        raise RequestError(f"{opened.folder.path} has its own tokenizer_config.json, which is kept: leave --chat out")
    tensors = to_hf(opened.tensors(WHOLE, dtype, untied=opened.args.has_vision), opened.args)
    written = ProgressCounter(sum(tensor.nbytes for tensor in tensors), progress)
    files = _assign(tensors, max_shard_bytes)
    with new_folder(target, force=force, n_bytes=written.total) as folder, opened.unchanged(verify):
        if opened.keeps_configs:
            _copy_configs(folder, opened, dtype)
        else:
            _write_configs(folder, opened, tensors[0].dtype, _is_chat_model(opened) if chat is None else chat)
        for name, held in files.items():
            write_safetensors(folder / name, held, written.advance)
        if len(files) > 1:
            weight_map = {tensor.name: name for name, held in files.items() for tensor in held}
            _write_json(folder / INDEX_NAME, {"metadata": {"total_size": written.total}, "weight_map": weight_map})
        write_sums(folder, [path.name for path in folder.iterdir()])
    return Path(target)


def parse_bytes(text: str) -> int:
    """ "5GB" -> 5,000,000,000; kiB, MiB, GiB and TiB are powers of 1024. Raises RequestError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    n_bytes = float(match[1]) * (1024 if match[3] else 1000) ** power if match else 0
    if not 1 <= n_bytes < 1 << 63:
        raise RequestError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB")
    return int(n_bytes)


@dataclass(frozen=True)
class Source:
    """A folder to convert; `args` counts each key/value head once, the files `repeats` times.

    A quantized release's tensors are dequantized as they are read.
    """

    folder: CheckpointFolder
    args: ModelArgs
    stored: Stored | Dequantized
    n_shards: int
    repeats: int
    tokenizer: Tokenizer | None
    carried: list[Path]
    stamps: dict[Path, tuple[int, int] | None]
    opened: Opened

    @classmethod
    def open(cls, name: str | Path) -> "Source":
        folder = open_folder(name)
        carried = carried_files(folder)
        stamps = {path: stamp_of(path) for path in (*carried, *folder.weights)}
        with watch_opened() as opened:
            args = folder.read_args()
            stored = open_weights(folder, args)
            tokenizer = folder.open_tokenizer(args) if folder.tokenizer else None
            for path in carried:
                read_carried(path)
        n_shards = 1 if folder.is_hugging_face else len(folder.shards)
        repeats = _kv_repeats(stored, args, n_shards)
        once = replace(args, n_kv_heads=args.n_kv_heads // repeats, quantization_args=None, lora_args=None)
        return cls(folder, once, stored, n_shards, repeats, tokenizer, carried, stamps, opened)

    @property
    def keeps_configs(self) -> bool:
        """Whether Hugging Face's config and tokenizer files still fit the tensors."""
        return self.folder.is_hugging_face and self.stored.kind is Kind.PLAIN

    @contextmanager
    def unchanged(self, verify: Verify) -> Iterator[None]:
        """Check the files while the block reads them.

        Raises CheckpointError if they do not match their checklist or have changed since `open`.
        """
        with verified(self.folder, verify, self.folder.tokenizer, self.carried, self.opened):
            yield
        for path, stamp in self.stamps.items():
            if stamp_of(path) != stamp:
                raise CheckpointError(
                    f"{path} changed while it was read, so nothing was written; try again when nothing writes to it"
                )

    def args_in(self, shards: int) -> ModelArgs:
        """The model's args for `shards` shards. Raises RequestError if they cannot be equal."""
        if type(shards) is not int or shards < 1:  # True is an int too
            raise RequestError(f"shards is {shards!r}, expected a whole number of 1 or more")
        heads, width, words = self.args.n_heads, self.args.ffn_dim, self.args.vocab_size
        split = [heads, width, words, *((self.args.vision_dim, self.args.dim, N_LEARNABLE) if self.args.has_vision else ())]
        if any(size % shards for size in split):
            possible = (n for n in range(1, heads + 1) if not any(size % n for size in split))
            images = f", and of the vision encoder ({self.args.vision_dim:,} features)" if self.args.has_vision else ""
            raise RequestError(
                f"{shards} shards cannot hold equal parts of {heads} query heads, {width:,} feed-forward features and "
                f"{words:,} tokens{images}; take one of {', '.join(map(str, possible))}"
            )
        return replace(self.args, n_kv_heads=_n_kv_heads_in(shards, self.args))

    def tensors(self, share: Share, dtype: torch.dtype | None, *, untied: bool = False) -> list[LazyTensor]:
        """A share of every tensor to write; a tied output is left out, unless `untied` is set."""
        out = []
        for name, shape in expected_shapes(self.args).items():
            if name == OUTPUT and self.stored.tied and not untied:
                continue
            ranges = shard_ranges(name, shape, self.args, share)
            to = dtype or self.stored.dtype(name)
            blocks = partial(self._blocks, name, self._in_files(name, ranges), shape, to)
            out.append(LazyTensor(name, part_shape(name, shape, ranges), to, blocks))
        return out

    def in_metas_format(self, tensors: list[LazyTensor]) -> list[LazyTensor]:
        """Tensors with the names that they have in Meta's shards."""
        return [replace(tensor, name=name_in_shards(tensor.name, self.args)) for tensor in tensors]

    def _in_files(self, name: str, ranges: list[range] | None) -> list[range] | None:
        """Translate ranges to the files, where each key/value head is repeated."""
        if ranges is None or self.repeats == 1 or is_shared(name) or not name.endswith((".wk.weight", ".wv.weight")):
            return ranges
        width = self.args.head_dim
        heads = [head for each in ranges for head in range(each.start // width, each.stop // width)]
        return [range(head * self.repeats * width, (head * self.repeats + 1) * width) for head in heads]

    def _blocks(self, name: str, ranges: list[range] | None, whole: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a tensor's rows in `dtype`, and whole heads of matrices that RoPE rotates."""
        multiple = self.args.head_dim if is_rotated(name) else 1
        if ranges and split_dim(name) == 0:
            row_bytes = math.prod(whole[1:]) * dtype.itemsize
            for some in _split(ranges, max(1, BLOCK_BYTES // row_bytes // multiple) * multiple):
                slices = self.stored.slices(name, [some])
                yield _cast(name, torch.cat([each.tensor for each in slices]), dtype)
                for each in slices:
                    each.release()
            return
        slices = self.stored.slices(name, ranges)
        n_rows = max(1, BLOCK_BYTES // (sum(each.tensor[0].numel() for each in slices) * dtype.itemsize))
        for start in range(0, whole[0], n_rows):
            yield _cast(name, torch.cat([each.tensor[start : start + n_rows] for each in slices], dim=-1), dtype)
        for each in slices:
            each.release()


def _split(ranges: list[range], size: int) -> Iterator[range]:
    for each in ranges:
        for start in range(each.start, each.stop, size):
            yield range(start, min(start + size, each.stop))


def _cast(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round rows to `dtype`. Raises CheckpointError if a finite value becomes infinite."""
    cast = rows.to(dtype)
    is_narrower = torch.promote_types(rows.dtype, dtype) != dtype
    if is_narrower and cast.isinf().any() and (cast.isinf() & rows.isfinite()).any():
        raise CheckpointError(
            f"{name} holds {rows.abs().nan_to_num(0, posinf=0).max():.3g}, but the largest {dtype_name(dtype)} is "
            f"{torch.finfo(dtype).max:.3g}; take another dtype"
        )
    return cast


def _n_kv_heads_in(shards: int, args: ModelArgs) -> int:
    """The number of key/value heads in all shards, repeats included."""
    return shards * len(kv_heads(args, Share(0, shards)))


def _kv_repeats(stored: Stored | Dequantized, args: ModelArgs, n_shards: int) -> int:
    """How often each key/value head is repeated.

    Equal heads count as repeats only if this number of shards needs repeats.
    """
    names = [f"layers.{i}.attention.{kind}.weight" for i in range(args.n_layers) for kind in ("wk", "wv")]
    for repeats in (n for n in range(args.n_kv_heads, 1, -1) if args.n_kv_heads % n == 0):
        once = replace(args, n_kv_heads=args.n_kv_heads // repeats)
        needs_copies = _n_kv_heads_in(n_shards, once) == args.n_kv_heads
        if needs_copies and all(_is_repeated(stored, name, repeats, args) for name in names):
            return repeats
    return 1


def _is_repeated(stored: Stored | Dequantized, name: str, repeats: int, args: ModelArgs) -> bool:
    run = repeats * args.head_dim
    for start in range(0, args.n_kv_heads * args.head_dim, run):
        slices = stored.slices(name, [range(start, start + run)])
        heads = torch.cat([each.tensor for each in slices]).unflatten(0, (repeats, args.head_dim)).view(torch.uint8)
        for each in slices:
            each.release()
        if not torch.equal(heads[:-1], heads[1:]):
            return False
    return True


def _write_params(folder: Path, source: Source, args: ModelArgs) -> None:
    """Write the source's params.json, unknown keys included, with `args`' number of KV heads."""
    if source.folder.is_hugging_face:
        write_params(folder, make_params(args))
    elif args.n_kv_heads == source.args.n_kv_heads * source.repeats and source.stored.kind is Kind.PLAIN:
        copy_carried(source.folder.params, folder)
    else:
        params = json.loads(read_carried(source.folder.params)) | {"n_kv_heads": args.n_kv_heads}
        for key in ("rope_scaling_factor", "quantization_args", "lora_args"):
            params.pop(key, None)
        if args.use_scaled_rope and args.rope_scaling_factor != usual_rope_factor(args.dim, args.n_heads, args.n_kv_heads):
            # The new shape no longer implies it.
            params["rope_scaling_factor"] = args.rope_scaling_factor
        write_params(folder, params)


def write_native_tokenizer(folder: Path, source: Source) -> None:
    """Copy tokenizer.model and its added tokens, or rebuild them from tokenizer.json, if any."""
    native, tokenizer = source.folder.tokenizer, source.tokenizer
    if native is None or tokenizer is None:
        return
    if native.suffix == ".json":
        write_tokenizer_model(folder, tokenizer.vocabulary)
        return
    for path in source.carried:
        if path.name in (native.name, ADDED_TOKENS):
            copy_carried(path, folder)


def write_conventions(folder: Path, source: Source) -> None:
    """Keep the source's end-of-text ids and chat template in a folder of Meta's format.

    Llama 3's own are left out, because `to_hugging_face` writes them anyway.
    """
    path, tokenizer = source.folder.path, source.tokenizer
    if tokenizer is None:
        return
    if warning := foreign_template(path):
        logger.warning("%s", warning)
    ends = end_ids(path, tokenizer.vocabulary)
    if ends and set(ends) != _usual_ends(tokenizer):
        settings = {"bos_token_id": tokenizer.bos_id, **read_settings(path / GENERATION_CONFIG)}
        _write_json(folder / GENERATION_CONFIG, settings | {"eos_token_id": one_or_several(ends)})
    template = chat_template_of(path)
    if template is not None and template != chat_template(tokenizer.vocabulary, images=source.args.has_vision):
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="")


def _usual_ends(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.eos_id, tokenizer.eom_id, tokenizer.eot_id}


def _is_chat_model(source: Source) -> bool:
    path = source.folder.path
    if (path / GENERATION_CONFIG).exists():
        return chat_template_of(path) is not None
    return not BASE_MODEL.fullmatch(source.folder.name)


def _copy_configs(folder: Path, source: Source, dtype: torch.dtype | None) -> None:
    """Copy the source's config and tokenizer files; update dtype and tying in config.json."""
    for path in source.carried:
        copy_carried(path, folder)
    config = json.loads(read_carried(source.folder.params))
    changed: dict[str, Any] = {}
    if dtype is not None:
        changed["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)  # transformers 5, and 4
        for section in (name for name in SECTIONS if name in config):  # of a vision model
            named = {key: dtype_name(dtype) for key in ("dtype", "torch_dtype") if key in config[section]}
            changed[section] = config[section] | named
    if bool(config.get("tie_word_embeddings")) != source.stored.tied:
        changed["tie_word_embeddings"] = source.stored.tied
    if changed:
        _write_json(folder / "config.json", config | changed)


def _write_configs(folder: Path, source: Source, dtype: torch.dtype, chat: bool) -> None:
    if source.tokenizer is None:
        raise CheckpointError(f"{source.folder.path} has no tokenizer, but config.json needs its ids; fetch tokenizer.model")
    path, vocabulary = source.folder.path, source.tokenizer.vocabulary
    own = end_ids(path, vocabulary)
    bos, eos = source.tokenizer.bos_id, own or (source.tokenizer.stop_tokens if chat else [source.tokenizer.eos_id])
    config = make_config(source.args, tied=source.stored.tied, dtype=dtype, bos=bos, eos=eos)
    texts = {i: text for text, i in (vocabulary.special | vocabulary.added).items()}
    of_tokenizer = tokenizer_config(
        vocabulary,
        config["max_position_embeddings"],
        instruct=chat,
        eos_token=next((texts[i] for i in own if i in texts and i not in _usual_ends(source.tokenizer)), None),
        template=chat_template_of(path),
        images=source.args.has_vision,
    )
    if source.args.has_vision:
        config = make_vision_config(source.args, config, pad=source.tokenizer.pad_id)
        vocabulary = with_image_last(vocabulary)
        _write_processor(folder, source.args, of_tokenizer.get("chat_template"))
    _write_json(folder / "config.json", config)
    settings = read_settings(path / GENERATION_CONFIG) or make_generation_config(bos=bos, eos=eos)
    _write_json(folder / GENERATION_CONFIG, dict(settings))
    write_tokenizer_json(folder / "tokenizer.json", vocabulary)
    _write_json(folder / "tokenizer_config.json", of_tokenizer)


def _write_processor(folder: Path, args: ModelArgs, template: str | None) -> None:
    """Write the config of transformers' image processor, and the chat template where it looks."""
    _write_json(folder / PREPROCESSOR_CONFIG, make_preprocessor_config(args))
    if template is not None:
        _write_json(folder / "chat_template.json", {"chat_template": template})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _assign(tensors: list[LazyTensor], max_bytes: int) -> dict[str, list[LazyTensor]]:
    """Distribute tensors over files of at most `max_bytes`, in order; by file name."""
    files: list[list[LazyTensor]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.nbytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {ONE_FILE: files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": held for n, held in enumerate(files, 1)}
