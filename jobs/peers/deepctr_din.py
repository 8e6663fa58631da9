"""DeepCTR-Torch's DIN on arrays.npz (user, history, target, label of train and test); prints a JSON line. Run by jobs/benchmark.py."""

import json
import sys
import time

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN
from sklearn.metrics import roc_auc_score

folder, batch_size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(1)
data = np.load(f"{folder}/arrays.npz")
items, length = int(data["items"]), data["history_train"].shape[1]
columns = [
    SparseFeat("user", int(data["users"]), embedding_dim=32),
    SparseFeat("target", items, embedding_dim=32),
    VarLenSparseFeat(
        SparseFeat("hist_target", items, embedding_dim=32, embedding_name="target"), maxlen=length, length_name="length"
    ),
]
inputs = {}
for split in ("train", "test"):
    # Its histories stand at the left end, with zeros after them.
    history = data[f"history_{split}"]
    lengths = (history > 0).sum(1)
    left = np.zeros_like(history)
    left[np.arange(length)[None] < lengths[:, None]] = history[history > 0]
    inputs[split] = {
        "user": data[f"user_{split}"],
        "target": data[f"target_{split}"],
        "hist_target": left,
        "length": lengths,
    }
model = DIN(columns, ["target"], dnn_hidden_units=(256, 128), att_hidden_size=(64, 32), l2_reg_embedding=0.0)
model.compile(torch.optim.Adam(model.parameters(), lr=1e-3), "binary_crossentropy")
started = time.perf_counter()
model.fit(inputs["train"], data["label_train"], batch_size=batch_size, epochs=1, verbose=0)
seconds = time.perf_counter() - started
scores = model.predict(inputs["test"], batch_size)
print(
    json.dumps(
        {"rows_per_second": len(data["label_train"]) / seconds, "auc": roc_auc_score(data["label_test"], scores)}
    )
)
