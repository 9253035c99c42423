"""What `llama-ref tune_lens` prints."""

import json
from typing import Any

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import new_table, number, percent, plain, point_name, say
from llama_ref.formatting import printable
from llama_ref.study.tuned.lens import HeldOut, TunedLens
from llama_ref.study.tuned.scores import LensScores


def print_fit(lens: TunedLens, folder: str, *, as_json: bool) -> None:
    """Print the logit lens's and the tuned lens's scores on held-out windows, by layer."""
    scores = lens.held_out
    assert scores is not None  # the lens was just fitted
    if as_json:
        print(json.dumps(_fit_json(scores, folder), indent=2))
        return
    table = new_table("after", *(f"{lens}\n{what}" for what in ("KL", "ECE") for lens in ("logit lens:", "tuned:")))
    logit, tuned = scores.logit, scores.tuned
    for p, point in enumerate(logit.points):
        kl = (number(each.kl[p]) for each in (logit, tuned))
        errors = (percent(each.calibration_error[p].item()) for each in (logit, tuned))
        table.add_row(point_name(point), *kl, *errors)
    print_rich(table)
    say(
        f"Means over {logit.n_tokens:,} tokens that the fit did not see. KL in nats, to the model's own predictions. ECE: how"
        " far the probability of the likeliest token is from how often it comes next."
    )
    worse = sum((tuned.kl[:-1] >= logit.kl[:-1]).tolist())
    if worse:
        say(f"In {worse} of {len(logit.kl) - 1} rows the tuned lens is no better: use more text or steps.", "red")
    say(printable(f"Read it with `llama-ref lens … --tuned {folder}`."), "green")


def _fit_json(scores: HeldOut, folder: str) -> dict[str, Any]:
    both = {"logit": scores.logit, "tuned": scores.tuned}
    return {
        "folder": folder,
        "n_tokens": scores.logit.n_tokens,
        "points": [
            {"point": point} | {name: _scores_json(each, p) for name, each in both.items()}
            for p, point in enumerate(scores.logit.points)
        ],
    }


def _scores_json(scores: LensScores, p: int) -> dict[str, Any]:
    return {name: plain(getattr(scores, name)[p]) for name in ("kl", "cross_entropy", "calibration_error")}
