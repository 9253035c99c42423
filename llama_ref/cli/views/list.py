"""What `llama-ref list` prints."""

import json
from pathlib import Path

from rich.table import Table

from llama_ref.checkpoint.folder import checkpoints_root, list_folders, open_folder
from llama_ref.cli.terminal import print_rich
from llama_ref.errors import CheckpointError
from llama_ref.formatting import human_bytes


def print_list(*, as_json: bool) -> None:
    """Print the checkpoints under `checkpoints_root()`; a note says why one cannot be opened."""
    rows = [_list_row(path) for path in list_folders()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(f"{checkpoints_root()} holds no checkpoints. Meta's downloader puts them there; any folder can be named by path.")
        return
    table = Table(title=str(checkpoints_root()), title_justify="left")
    for column in ("name", "shards", "size", "checklist", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        size = human_bytes(row["bytes"]) if row["bytes"] else ""
        table.add_row(row["name"], str(row["shards"] or ""), size, "yes" if row["checklist"] else "", row["note"])
    print_rich(table)


def _list_row(path: Path) -> dict:
    try:
        folder = open_folder(path)
    except CheckpointError as error:
        return {"name": path.name, "shards": 0, "bytes": 0, "checklist": False, "note": str(error)}
    return {
        "name": path.name,
        "shards": len(folder.shards),
        "bytes": folder.shard_bytes,
        "checklist": folder.checklist is not None,
        "note": "",
    }
