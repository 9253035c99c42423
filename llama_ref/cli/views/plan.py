"""What `llama-ref plan` prints: a table of layouts, and the command for the smallest that fits."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from llama_ref.formatting import dtype_name, human_bytes, printable
from llama_ref.plan import (
    CARDS_PER_NODE,
    SET_ASIDE,
    SHOWN_DTYPES,
    Layout,
    Model,
    Placement,
    Workload,
    count_parameters,
    longest,
    plan,
    smaller_workload,
    smallest,
)

COMMAND_WIDTH = 78
EXAMPLES = 4  # prompts in one batch of the example scripts


def print_plan(model: Model, workload: Workload, dtype: str | None = None, *, as_json: bool) -> bool:
    """Print layouts of a model in `dtype`, as tables or JSON; return whether any of them fits.

    The default is bfloat16, and float32 too where the weights are not quantized.
    """
    shown = SHOWN_DTYPES[:1] if model.scheme else SHOWN_DTYPES
    dtypes = shown if dtype is None else (_full_name(dtype),)
    placements = plan(model, workload, dtypes)
    best = smallest(placements)
    if as_json:
        print(json.dumps(_as_json(model, workload, placements), indent=2))
    else:
        _print_tables(model, workload, placements)
    return best is not None


def start_command(model: Model, workload: Workload, placement: Placement) -> list[str]:
    """Return the command that starts a placement with the example script, split into words.

    With several nodes, run it on each, with HOST replaced by the name of one of them.
    """
    nodes, per_node = placement.layout.nodes
    chats = any(word in model.name.lower() for word in ("instruct", "guard", "chat"))
    words = ["torchrun"]
    if nodes > 1:
        words += [f"--nnodes {nodes}", "--rdzv_backend c10d", "--rdzv_endpoint HOST:29500"]
    words += [f"--nproc_per_node {per_node}", f"scripts/{'chat' if chats else 'text'}_completion.py"]
    words += [f"--ckpt_dir {shlex.quote(model.ckpt_dir)}"]
    words += [f"--max_seq_len {workload.max_seq_len}", f"--max_batch_size {workload.max_batch_size}"]
    if placement.layout.stages > 1:
        words.append(f"--pipeline_parallel_size {placement.layout.stages}")
    if model.scheme and not model.is_quantized:
        words.append(f"--quantize {model.scheme}")
    return words if placement.dtype == "bfloat16" else [*words, f"--dtype {placement.dtype}"]


def _full_name(dtype: str) -> str:
    from llama_ref.device import named_dtype

    return dtype_name(named_dtype(dtype))


def _as_json(model: Model, workload: Workload, placements: list[Placement]) -> dict[str, Any]:
    best = smallest(placements)
    return {
        "name": model.name,
        "parameters": _n_parameters(model),
        "quantization": model.quantization,
        **asdict(workload),
        "card_bytes": workload.card_bytes,
        "set_aside_bytes": SET_ASIDE,
        "notes": list(_notes(model, workload, placements)),
        "smallest": best and {**_row(best), "command": " ".join(start_command(model, workload, best))},
        "advice": None if best else _advice(model, workload, placements),
        "layouts": [_row(placement) for placement in placements],
    }


def _row(placement: Placement) -> dict[str, Any]:
    need = placement.need
    return {
        "dtype": placement.dtype,
        "processes": placement.layout.processes,
        "tensor_parallel_size": placement.layout.tensor,
        "pipeline_parallel_size": placement.layout.stages,
        "weight_bytes": need.weights,
        "kv_cache_bytes": need.kv_cache,
        "activation_bytes": need.activations,
        "total_bytes": need.total,
        "fits": placement.fits,
    }


def _print_tables(model: Model, workload: Workload, placements: list[Placement]) -> None:
    from llama_ref.cli.terminal import print_rich

    sequences = f"{workload.max_batch_size:,} sequence{'s' if workload.max_batch_size > 1 else ''}"
    print_rich(Text(f"{printable(model.name)}: {_n_parameters(model):,} parameters"))
    print_rich(Text(f"{sequences} of {workload.max_seq_len:,} tokens"))
    usable = human_bytes(workload.card_bytes)
    print_rich(Text(f"cards of {workload.gpu_memory:g} GB (binary), of which programs can use {usable} (decimal, as below)\n"))
    by_dtype = {p.dtype: [q for q in placements if q.dtype == p.dtype] for p in placements}
    for dtype, own in by_dtype.items():
        print_rich(_table(model, workload, dtype, own))
    print_rich(Text("Sizes: of the process that needs most. Total: including 1 GB reserved for CUDA itself."))
    print_rich(Text("Longest: the max_seq_len that fits at this batch size, within the model's context."))
    for note in _notes(model, workload, placements):
        print_rich(Text(f"note: {printable(note)}"))
    for dtype, own in by_dtype.items():
        best = smallest(own)
        if best:
            print_rich(Text(f"\n{dtype}: {_counted(best.layout)}", style="green"))
            print("\n".join(_wrapped(start_command(model, workload, best))))
    if not smallest(placements):
        print_rich(Text(f"\n{_advice(model, workload, placements)}", style="red"))


def _table(model: Model, workload: Workload, dtype: str, placements: list[Placement]) -> Table:
    title = f"{model.scheme}, computed in {dtype}" if model.scheme else dtype
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("cards", "tensor", "stages", "weights", "KV cache", "activations", "total", "fits", "longest"):
        table.add_column(name, justify="left" if name == "fits" else "right", no_wrap=True)
    for placement in _worth_showing(placements):
        layout, need = placement.layout, placement.need
        sizes = (need.weights, need.kv_cache, need.activations, need.total)
        numbers = map(str, (layout.processes, layout.tensor, layout.stages))
        fits = Text("yes", style="green") if placement.fits else Text("no", style="red")
        tokens = longest(model, workload, placement)
        table.add_row(*numbers, *map(human_bytes, sizes), fits, f"{tokens:,}" if tokens else "none")
    return table


def _worth_showing(placements: list[Placement]) -> list[Placement]:
    """Select the layouts of one stage and the smallest fit; more if one node is not enough."""
    best = smallest(placements)
    widest = max(p.layout.tensor for p in placements if not p.layout.spans_nodes)
    in_one_node = any(p.fits and p.layout.stages == 1 and not p.layout.spans_nodes for p in placements)
    return [p for p in placements if p.layout.stages == 1 or p is best or (not in_one_node and p.layout.tensor == widest)]


def _notes(model: Model, workload: Workload, placements: list[Placement]) -> Iterator[str]:
    if workload.max_seq_len > model.context:
        yield (
            f"{model.name} was trained for {model.context:,} tokens and cannot use more; --max_seq_len asks for "
            f"{workload.max_seq_len:,}"
        )
    if any(placement.layout.spans_nodes for placement in placements):
        yield (
            f"tensor above {CARDS_PER_NODE} splits every matrix across nodes of {CARDS_PER_NODE} cards, so every layer waits "
            "for the network: stages are faster"
        )
    if workload.max_batch_size < EXAMPLES:
        yield f"the example scripts run {EXAMPLES} prompts at a time, which --max_batch_size {workload.max_batch_size} rejects"


def _counted(layout: Layout) -> str:
    nodes, per_node = layout.nodes
    if layout.processes == 1:
        return "1 card is enough"
    stages = f", in {layout.stages} stages" if layout.stages > 1 else ""
    where = f" (run it on each of {nodes} nodes of {per_node} cards; HOST is one of them)" if nodes > 1 else ""
    return f"{layout.processes} cards are enough{stages}{where}"


def _advice(model: Model, workload: Workload, placements: list[Placement]) -> str:
    dtypes = dict.fromkeys(placement.dtype for placement in placements)
    least = min(placements, key=lambda placement: placement.need.total)
    found = (
        f"nothing fits: even {least.layout.processes} processes need {human_bytes(least.need.total)} each in {least.dtype}, "
        f"but a card has {human_bytes(workload.card_bytes)}"
    )
    smaller = smaller_workload(model, workload, dtypes)
    if smaller:
        return f"{found}; --max_batch_size {smaller.max_batch_size} --max_seq_len {smaller.max_seq_len} would fit"
    return f"{found}; a smaller max_seq_len or max_batch_size does not help: use larger cards or a smaller release"


def _n_parameters(model: Model) -> int:
    return count_parameters(model.args, model.tied)


def _wrapped(words: list[str]) -> list[str]:
    """Break a command into lines that a shell reads as one."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) + len(" \\") > COMMAND_WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return lines
