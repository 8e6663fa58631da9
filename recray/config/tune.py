"""The [tune] table: a sweep over values of the configuration's own keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from recray.config.section import Section

_AXIS = frozenset(("low", "high", "step", "log", "choices", "when"))


class Axis(Section):
    """What one key may be: a number from low to high, or one of choices."""

    low: float | None = None
    high: float | None = None
    step: float | None = Field(None, description="only low, low + step, ...; a grid needs it between low and high")
    log: bool = Field(False, description="as many draws between 1 and 10 as between 10 and 100")
    choices: list[Any] | None = None
    when: dict[str, list[Any]] = Field(
        {},
        description='other keys and the values that they must have for this one to count, e.g. {"model.name" = "din"}',
    )

    @field_validator("when", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: one if isinstance(one, list) else [one] for key, one in _flat(value).items()}


class TuneConfig(Section):
    """Many trains on one prepared dataset, each with values of its own for the keys of `space`."""

    search: Literal["random", "grid", "tpe", "pbt"] = Field(
        "random",
        description="tpe: multivariate TPE of Optuna; pbt: population-based training, members take over weights and values of better ones",
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="what ends a trial early; not with pbt, whose members all train to the end"
    )
    metric: str | None = Field(None, description="what is compared; training.metric when unset")
    mode: Literal["max", "min"] | None = Field(None, description="as the metric has it when unset")
    trials: int | None = Field(
        None, ge=1, description="trials at most, of pbt the members; unset: 24, of pbt 8, of a grid all its points"
    )
    seconds: float | None = Field(
        None, gt=0, description="wall time of the search; of earlier starts what their trials took"
    )
    epochs: int | None = Field(None, ge=1, description="epochs of all trials together")
    concurrent: int | None = Field(None, ge=1, description="trials at a time; as many as fit when unset")
    cpus_per_trial: int | None = Field(
        None, ge=1, description="of a trial of one worker; scaling.cpus_per_worker when unset"
    )
    gpus_per_trial: float | None = Field(
        None, gt=0, description="of a trial of one worker, 0.5 = two share one; with scaling.use_gpu 1 when unset"
    )
    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before so many; asha: its first rung")
    reduction_factor: float = Field(4.0, gt=1, description="asha: one of so many goes on at each rung, the others wait")
    perturb_epochs: int = Field(2, ge=1, description="pbt: epochs between two looks at the others")
    top: int = Field(3, ge=0, description="so many of the best are trained again before one is called best; 0 = none")
    seeds: int = Field(3, ge=1, description="on so many seeds each, none of them run.seed")
    space: dict[str, Axis] = {}

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Keys may be quoted ("optim.learning_rate") or nested as TOML nests them without quotes."""
        return _flat(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _population(self) -> TuneConfig:
        if self.search == "pbt" and "scheduler" in self.model_fields_set and self.scheduler != "none":
            raise ValueError(
                f"scheduler = '{self.scheduler}' does not go with search = 'pbt', whose members all train to the end: leave it out"
            )
        return self


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys; an axis is not looked into."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        inner = isinstance(value, dict) and value and not _AXIS & value.keys()
        flat |= _flat(value, f"{dotted}.") if inner else {dotted: value}
    return flat
