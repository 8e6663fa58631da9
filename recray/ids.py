"""Reserved ids and the names of the splits, shared by every layer. Imports nothing.

Items, users and the values of categorical features have integer ids of one layout:

    0           PAD: padding; the missing value of a feature
    1           UNKNOWN: not in the vocabulary that a model was trained with
    2, 3, ...   real items (users, values): those of the training split by falling count, then those that the validation
                split adds, which only a model that is refitted on both splits knows

An item table of 1,000 items therefore has 1,002 rows, and row i describes item id i.
"""

from __future__ import annotations

PAD = 0  # never a target, never recommended
UNKNOWN = 1  # may occur in a history or as a target (always a miss), never recommended
FIRST_ITEM = 2  # the item with the most training events
NUM_RESERVED = FIRST_ITEM  # ids below the first real one

SPLITS = ("train", "valid", "test")  # in order of time
