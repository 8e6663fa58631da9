"""One epoch of RecTools' SASRec on an events file; prints a JSON line. Run by jobs/benchmark.py in RecTools' own environment."""

import json
import sys
import time

import pandas as pd
from pytorch_lightning import Callback, Trainer
from rectools.dataset import Dataset
from rectools.models import SASRecModel

seconds = []


class Clock(Callback):
    def on_train_epoch_start(self, trainer, module):
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        seconds.append(time.perf_counter() - self.started)


def trainer() -> Trainer:
    return Trainer(
        max_epochs=int(sys.argv[2]),
        accelerator="cpu",
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


events = pd.read_parquet(sys.argv[1], columns=["user_id", "item_id", "timestamp"])
events = events.sort_values(["user_id", "timestamp"], kind="stable")
from_end = events.groupby("user_id").cumcount(ascending=False)
events = events[from_end >= 2]  # as leave_last: the last event is test, the one before it validation
frame = events.rename(columns={"timestamp": "datetime"}).assign(weight=1.0)
frame["datetime"] = pd.to_datetime(frame["datetime"], unit="s")
model = SASRecModel(
    session_max_len=200,
    n_factors=64,
    n_blocks=2,
    n_heads=1,
    dropout_rate=0.2,
    loss="softmax",
    lr=1e-3,
    batch_size=128,
    deterministic=False,
    get_trainer_func=trainer,
)
model.fit(Dataset.construct(frame))
print(json.dumps({"seconds": seconds, "events": len(events)}))
