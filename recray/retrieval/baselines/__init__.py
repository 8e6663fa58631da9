"""Baselines that a model has to beat, and bounds to judge it by. One file each; your own is a plug-in like these.

    popularity           by the events that the model was trained on
    recent_popularity    by events in a window before the split
    rolling_popularity   by events in a window before each query, other users' events in the split among them
    transitions          by choices right after the user's last items in a window before each query, and by popularity
    item_knn             items that users of the same items chose
    hindsight            by events of the split itself: about the best that one fixed list for all users can reach
    oracle               the simulator's own probabilities: the upper bound of simulated data

Items with equal scores are in order of id everywhere: ids are sorted by falling train count, then by key.
"""

from __future__ import annotations

from collections.abc import Mapping

from recray import registry
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import NotApplicableError
from recray.retrieval import Recommender


def open_baselines(
    config: Config, dataset: PreparedDataset, split: str, built: Mapping[str, Recommender]
) -> tuple[dict[str, Recommender], dict[str, str]]:
    """The baselines of `evaluation.baselines` by name, and why others of them are left out.

    dataset: as the model knows it. built: baselines that exist already, to be used again.
    """
    found, left_out = dict[str, Recommender](), dict[str, str]()
    for name in config.evaluation.baselines:
        if name == "oracle" and config.data.source != "simulated":
            continue  # among the defaults, and of no other data
        if name in built:
            found[name] = built[name]
            continue
        module = registry.load("baseline", name, config.run.plugins)
        try:
            options = config.evaluation.baseline_options.get(name) or module.Options()
            found[name] = module.build(options, dataset, split)
        except NotApplicableError as error:
            left_out[name] = str(error)
    return found, left_out
