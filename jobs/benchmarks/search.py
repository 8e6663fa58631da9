"""Exact search against faiss Flat, and the index sweep against bare faiss, at equal threads; on a GPU against torch's own."""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from benchmarks.figures import report

_DIM, _K, _SEEN = 64, 100, 50


def run(
    items: Annotated[list[int] | None, typer.Option(help="catalogue sizes [default: 100000 and 1000000]")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="[default: 1 and 2]")] = None,
    queries: Annotated[int, typer.Option(help="in one batch: faiss, too, takes them as one matrix")] = 256,
    device: Annotated[str, typer.Option(help="cpu, or cuda: exact search alone, faiss is not needed")] = "cpu",
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Milliseconds a query, 64 wide, 100 best: recray's exact search and faiss's, and the same without the 50 items that
    a user has seen, which faiss answers by searching for 150; then IVF at one setting through recray's sweep and bare."""
    if device != "cpu":
        return report(_on_device(items or [100_000, 1_000_000], queries, device), out)
    import faiss
    import numpy as np
    import torch

    from recray.ids import FIRST_ITEM
    from recray.loading.batch import Jagged
    from recray.retrieval import faiss_index, recall_sweep
    from recray.retrieval.exact import top_k

    figures: dict[str, object] = {"queries": queries, "k": _K, "dim": _DIM}
    for count in items or [100_000, 1_000_000]:
        rng = np.random.default_rng(count)
        v_ND = rng.standard_normal((count, _DIM)).astype(np.float32)
        q_QD = rng.standard_normal((queries, _DIM)).astype(np.float32)
        q, v = torch.from_numpy(q_QD), torch.from_numpy(v_ND)
        values = torch.from_numpy(rng.integers(FIRST_ITEM, count, queries * _SEEN))
        seen = Jagged(values, torch.arange(queries + 1) * _SEEN)
        flat = faiss.IndexFlatIP(_DIM)
        flat.add(v_ND)
        # Ids below FIRST_ITEM are no items: recray never returns them, so faiss is asked for as many more.
        found, (_, ids) = top_k(q, v, _K)[0].numpy(), flat.search(q_QD, _K + FIRST_ITEM)
        same = np.mean([len(set(a) & set(b[b >= FIRST_ITEM][:_K])) / _K for a, b in zip(found, ids, strict=True)])
        figures[f"{count}_agreement"] = float(same)
        for used in threads or [1, 2]:
            torch.set_num_threads(used)
            faiss.omp_set_num_threads(used)
            name = f"{count}_threads{used}"
            for kind, exclude, extra in (("", None, 0), ("_seen", seen, _SEEN)):
                ours_of = partial(top_k, q, v, _K, exclude)
                pair = _in_turns(ours_of, partial(flat.search, q_QD, _K + FIRST_ITEM + extra))
                ours, theirs = (seconds * 1000 / queries for seconds in pair)
                figures |= {f"{name}{kind}_ms": ours, f"{name}{kind}_faiss_ms": theirs}
                figures[f"{name}{kind}_speedup"] = theirs / ours
        index, _ = faiss_index.build(v_ND, "IVF1024,Flat", "never")
        faiss_index.apply(index, {"nprobe": 16})
        exact = recall_sweep.exact_scores(q_QD, v_ND, _K)
        ours_of, measured = partial(recall_sweep.measure, index, q_QD, exact, _K), list[float]()
        _, bare = _in_turns(
            lambda m=measured, f=ours_of: m.append(f()[3]),  # type: ignore[misc]
            partial(index.search, q_QD, _K + FIRST_ITEM),
        )
        figures[f"{count}_sweep_ms"] = min(measured)
        figures[f"{count}_sweep_over_faiss"] = min(measured) / (bare * 1000 / queries)
    report(figures, out)


def _on_device(items: list[int], queries: int, device: str) -> dict[str, object]:
    """The same questions to recray's search and to one product and `topk` of whole rows."""
    import torch

    from recray.retrieval.exact import top_k

    def timed(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            function()
            torch.cuda.synchronize(device)

        return run

    figures: dict[str, object] = {
        "queries": queries,
        "k": _K,
        "dim": _DIM,
        "device": torch.cuda.get_device_name(device),
    }
    for count in items:
        q, v = (torch.randn(n, _DIM, device=device) for n in (queries, count))
        ours, plain = _in_turns(timed(partial(top_k, q, v, _K)), timed(lambda q=q, v=v: (q @ v.T).topk(_K)))  # type: ignore[misc]
        figures |= {f"{count}_ms": ours * 1000 / queries, f"{count}_plain_ms": plain * 1000 / queries}
        figures[f"{count}_speedup"] = plain / ours
    return figures


def _in_turns(first: Callable[[], Any], second: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Seconds of each, the fastest of `repeats`, one after the other so that both meet the same machine."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for at, function in enumerate((first, second)):
            started = time.perf_counter()
            function()
            best[at] = min(best[at], time.perf_counter() - started)
    return best[0], best[1]
