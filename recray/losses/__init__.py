"""Losses: one file each, `recray/losses/<name>.py` is the loss `<name>` (its options: recray.config.losses).

A file defines `Options` and

    loss(options, model, batch, items, gather) -> Tensor        () float32: sum over the batch of weight * loss

with `model` a Retriever or Ranker, `items` the counts of the items in training, and `gather` the way to the other workers'
rows. The training loop divides by the sum of the weights of all workers. README.md in this folder shows how to write one.
"""
