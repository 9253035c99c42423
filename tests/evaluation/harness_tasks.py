"""Write tasks of the harness's three kinds into a folder.

They need no network and no external data.
"""

import json
from pathlib import Path

CAPITALS = [("France", 0), ("Japan", 2), ("Italy", 1), ("Spain", 0)]
CITIES = ["Paris", "Rome", "Tokyo", "Madrid and its surroundings"]
PAGES = ["The cat sat on the mat.", "Water boils at 100 degrees. " * 15, "서울은 대한민국의 수도이다.", "x"]
SENTENCES = ["Once upon a time there was a", "The three primary colors are red, blue and", "One, two, three,", "Water is"]

CHOICES = """
task: choices
output_type: multiple_choice
doc_to_text: "{{description}}The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATED = """
task: sentences
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> Path:
    """Make a folder for --include_path with the tasks choices, pages and sentences."""
    shared = "A list of capitals of the world, which everybody who went to school in any country should know by heart. " * 2
    choices = [
        {"description": shared if i % 2 else "", "country": country, "choices": CITIES, "answer": answer}
        for i, (country, answer) in enumerate(CAPITALS)
    ]
    _write(folder, "choices", CHOICES, choices)
    _write(folder, "pages", ROLLING, [{"page": page} for page in PAGES])
    _write(folder, "sentences", GENERATED, [{"text": text, "target": " yellow"} for text in SENTENCES])
    return folder


def _write(folder: Path, name: str, task: str, rows: list[dict]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(f"{task.strip()}\n{source}", encoding="utf-8")
