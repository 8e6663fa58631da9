"""torch-rechub's DIN on arrays.npz (user, history, target, label of train and test); prints a JSON line. Run by jobs/benchmark.py."""

import json
import sys
import time

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

folder, batch_size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(1)
data = np.load(f"{folder}/arrays.npz")
items = int(data["items"])
inputs = {s: {name: data[f"{name}_{s}"] for name in ("user", "target", "history")} for s in ("train", "test")}
user = SparseFeature("user", vocab_size=int(data["users"]), embed_dim=32)
target = SparseFeature("target", vocab_size=items, embed_dim=32, padding_idx=0)
history = SequenceFeature("history", vocab_size=items, embed_dim=32, pooling="concat", shared_with="target")
model = DIN(
    features=[user],
    history_features=[history],
    target_features=[target],
    mlp_params={"dims": [256, 128]},
    attention_mlp_params={"dims": [64, 32]},
)
loaders = DataGenerator(inputs["train"], data["label_train"]).generate_dataloader(
    x_val=inputs["test"],
    y_val=data["label_test"],
    x_test=inputs["test"],
    y_test=data["label_test"],
    batch_size=batch_size,
)
trainer = CTRTrainer(model, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu", model_path=folder)
started = time.perf_counter()
trainer.train_one_epoch(loaders[0])
seconds = time.perf_counter() - started
scores = trainer.predict(model, loaders[2])
print(
    json.dumps(
        {"rows_per_second": len(data["label_train"]) / seconds, "auc": roc_auc_score(data["label_test"], scores)}
    )
)
