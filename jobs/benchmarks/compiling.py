"""training.compile on and off."""

import tempfile
from typing import Annotated, Any

import typer

from benchmarks.figures import report

_MODELS: dict[str, dict[str, Any]] = {
    "two_tower": {"model": {"name": "two_tower", "dim": 32}, "training": {"global_batch_size": 1024}},
    "sasrec": {
        "model": {"name": "sasrec"},
        "loss": {"name": "softmax"},
        "training": {"global_batch_size": 64},
    },
}


def run(
    epochs: Annotated[int, typer.Option(min=2, help="of each; the first compiles, the fastest other counts")] = 3,
    model: Annotated[list[str] | None, typer.Option(help="[default: two_tower and sasrec]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """two_tower and SASRec without Ray, 60,000 simulated events: events/s compiled over events/s as they are, and
    seconds of the first epoch, which compiles."""
    import recray
    from recray.config import parse_config

    figures: dict[str, object] = {}
    for name in model or list(_MODELS):
        rates = {}
        with tempfile.TemporaryDirectory() as folder:
            for compiled in (False, True):
                table = {key: dict(value) for key, value in _MODELS[name].items()}
                table["run"] = {"name": f"compile-{compiled}", "output": folder, "dataset": f"{folder}/dataset"}
                table["data"] = {"source": "simulated", "simulated": {"events": 60_000, "users": 500, "items": 500}}
                table["training"] |= {"epochs": epochs, "compile": compiled, "validate_every": epochs}
                table["scaling"] = {"num_workers": 0, "use_gpu": device == "cuda"}
                config = parse_config(table)
                recray.prepare(config)
                first, *later = recray.train(config).history
                rates[compiled] = max(entry["events_per_second"] for entry in later)
        figures |= {f"{name}_compiled_over_eager": rates[True] / rates[False], f"{name}_first_epoch": first["seconds"]}
    report(figures | {"device": device}, out)
