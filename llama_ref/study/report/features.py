"""The features that fire in a text, as the page's data."""

from typing import Any

from llama_ref.study.features.firing import Firing

MOST = 12  # maximum number of features listed at a token
DIGITS = 4


def firing_data(found: Firing) -> dict[str, Any]:
    """The dictionary's description, each token's strongest features, and all tokens at which these fire.

    `values` maps a feature's label to the tokens at which it fires, with its values.
    """
    strongest = [found.active.at(position, MOST) for position in range(len(found.tokens))]
    listed = {feature for own in strongest for feature, _ in own}
    values: dict[int, list[tuple[int, float]]] = {feature: [] for feature in sorted(listed)}
    parts = (found.active.tokens, found.active.features, found.active.values)
    for token, feature, value in zip(*(part.tolist() for part in parts), strict=True):
        if feature in values:
            values[feature].append((token, float(f"{value:.{DIGITS}g}")))
    return {
        "name": found.name,
        "form": found.form,
        "where": found.where,
        "legend": found.legend,
        "n_features": found.active.n_features,
        "counts": found.active.counts().tolist(),
        "strongest": [[found.label(feature) for feature, _ in own] for own in strongest],
        "values": {found.label(feature): own for feature, own in values.items()},
    }
