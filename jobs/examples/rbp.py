"""A metric of your own: rank-biased precision (Moffat & Zobel, TOIS 2008).

rbp@K = (1 - p) sum over places i = 1 .. K of p^(i - 1) [r_i is a target]        p: patience of the reader

training.metric = "rbp@10"        selects the best checkpoint
evaluation.metrics = ["rbp"]      adds it to the report, at every evaluation.k
"""

from __future__ import annotations

import numpy as np

from recray.metrics import ListMetric

_PATIENCE = 0.8


def rank_biased_precision(hits_BK: np.ndarray, num_targets_B: np.ndarray) -> np.ndarray:
    weight_K = (1 - _PATIENCE) * _PATIENCE ** np.arange(hits_BK.shape[1])
    return np.asarray(hits_BK @ weight_K)


metric = ListMetric(rank_biased_precision)  # higher_is_better=False for one that falls
