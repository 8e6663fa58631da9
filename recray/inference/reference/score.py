"""Scores a bundle of `recray export` with torch, faiss and pyarrow. `python score.py` replays its test.json.
A request is {"user": key} or {"history": [item keys, oldest first]}; "context" and "user_features": raw values by name."""

import hashlib
import json
import sys
from pathlib import Path

import faiss
import pyarrow.parquet as pq
import torch
from encoding import encode, read_features


class Bundle:
    def __init__(self, folder):
        self.path, self.manifest = Path(folder), json.loads(Path(folder, "manifest.json").read_text())
        for name, file in self.manifest["files"].items():
            assert hashlib.sha256((self.path / name).read_bytes()).hexdigest() == file["sha256"], f"{name} is damaged"
        self.features = read_features(self.path / "features.json")
        items, self.users = (pq.read_table(self.path / f"{name}.parquet") for name in ("items", "users"))
        self.keys, counts = items["item"].to_pylist(), items["count"].to_pylist()
        self.item_id = {key: number for number, key in enumerate(self.keys) if number > 1}  # 0 padding, 1 unknown
        self.popular = sorted(self.item_id.values(), key=lambda number: -counts[number])
        self.user_row = {key: number for number, key in enumerate(self.users["user"].to_pylist())}
        self.programs = {n: torch.export.load(self.path / f"{n}.pt2").module() for n in self.manifest["programs"]}
        if "query" in self.programs:
            self.index = faiss.read_index(str(self.path / "index" / "index.faiss"))
            for name, value in self.manifest["index_setting"].items():
                faiss.ParameterSpace().set_index_parameter(self.index, name, value)

    def inputs(self, request):  # user id, item ids of the history, features by column
        row = self.user_row.get(request.get("user"))
        known = {"id": 0, "history": []} if row is None else self.users.slice(row, 1).to_pylist()[0]
        if request.get("history") is not None:
            known["history"] = [self.item_id.get(key, 1) for key in request["history"]]
        features = {}
        for one in self.features:
            given = request.get("user_features" if one["role"] == "user" else "context") or {}
            raw = one["name"] in given or one["column"] not in known
            features[one["column"]] = encode(one, given.get(one["name"])) if raw else known[one["column"]]
        return known["id"], known["history"], features

    def run(self, program, user, history, features, *items):  # a row for each item, or one
        rows, length = len(items[0]) if items else 1, self.manifest["programs"][program]["history_length"]
        columns = {name: torch.tensor([[0] if value == [] else value] * rows) for name, value in features.items()}
        given = [
            torch.tensor([user] * rows),
            torch.tensor([history[-length:] or [0]] * rows),
            *map(torch.tensor, items),
        ]
        with torch.inference_mode():
            return self.programs[program](*given, columns)

    def recommend(self, request, k=10):  # [(item key, score)], best first; popular items without scores for strangers
        user, history, features = self.inputs(request)
        if not history:
            return [(self.keys[number], None) for number in self.popular[:k]]
        seen = history if self.manifest["exclude_seen"] else []
        wanted = self.manifest["candidates"] if "ranker" in self.programs else k
        query = self.run("query", user, history, features).numpy()
        scores, ids = self.index.search(query, min(self.index.ntotal, wanted + 2 + len(seen)))
        found = {n: s for n, s in zip(ids[0].tolist(), scores[0].tolist(), strict=True) if n > 1 and n not in seen}
        best = list(found.items())[:wanted]
        if "ranker" in self.programs and best:
            logits = self.run("ranker", user, history, features, [number for number, _ in best]).tolist()
            best = sorted(((n, s) for (n, _), s in zip(best, logits, strict=True)), key=lambda one: -one[1])
        return [(self.keys[number], score) for number, score in best[:k]]

    def score(self, request):  # probability that request["item"] is chosen
        return torch.sigmoid(self.run("ranker", *self.inputs(request), [self.item_id.get(request["item"], 1)])).item()


if __name__ == "__main__":
    bundle, worst = Bundle(Path(__file__).parent), 0.0
    for case in (cases := json.loads(Path(__file__).with_name("test.json").read_text())):
        found = bundle.recommend(case["request"]) if "items" in case else [(None, bundle.score(case["request"]))]
        assert [item for item, _ in found] == case.get("items", [None]), f"{found} instead of {case}"
        worst = max([worst, *(abs(a - b) for (_, a), b in zip(found, case["scores"], strict=True) if b is not None)])
    sys.exit(f"scores differ by {worst:.1e}" if worst > 1e-5 else print(f"{len(cases)} requests, within {worst:.1e}"))
