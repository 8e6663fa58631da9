"""The [tune] table: a search over values of the configuration's own keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from recray.config.section import Section

_AXIS = frozenset(("low", "high", "step", "log", "choices", "when"))


class Axis(Section):
    """Values of one key: a number from low to high, or one of choices."""

    low: float | None = Field(None, description="smallest value")
    high: float | None = Field(None, description="largest value")
    step: float | None = Field(None, description="only low, low + step, ...; required by a grid for low and high")
    log: bool = Field(False, description="draw uniformly on a log scale")
    choices: list[Any] | None = Field(None, description="values to choose from, instead of low and high")
    when: dict[str, list[Any]] = Field(
        {}, description='draw this key only if other keys have these values, e.g. {"model.name" = "din"}'
    )

    @field_validator("when", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: one if isinstance(one, list) else [one] for key, one in _flat(value).items()}


class TuneConfig(Section):
    """A hyperparameter search: many trials on one prepared dataset, each with its own values for the keys of `space`."""

    search: Literal["random", "grid", "tpe", "pbt"] = Field(
        "random",
        description="how values are chosen; tpe: multivariate TPE of Optuna; pbt: population-based training, members copy weights and values of better ones",
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        "asha", description="how trials are stopped early; not with pbt, whose members all train to the end"
    )
    metric: str | None = Field(None, description="metric that trials are compared by; unset: training.metric")
    mode: Literal["max", "min"] | None = Field(None, description="direction of the metric; unset: the metric's own")
    trials: int | None = Field(
        None,
        ge=1,
        description="maximum number of trials (pbt: members); unset: 24, with pbt 8, with a grid all its points",
    )
    seconds: float | None = Field(
        None, gt=0, description="time budget of the search, including the trials of earlier starts"
    )
    epochs: int | None = Field(None, ge=1, description="budget of epochs, over all trials")
    concurrent: int | None = Field(None, ge=1, description="trials at a time; unset: as many as fit")
    cpus_per_trial: int | None = Field(
        None, ge=1, description="CPUs of a trial with one worker; unset: scaling.cpus_per_worker"
    )
    gpus_per_trial: float | None = Field(
        None,
        gt=0,
        description="GPUs of a trial with one worker, 0.5 = two trials share one; unset: 1 if scaling.use_gpu",
    )
    grace_epochs: int = Field(1, ge=1, description="epochs before a trial can be stopped; with asha the first rung")
    reduction_factor: float = Field(
        4.0, gt=1, description="asha: one of this many trials is promoted at each rung, the others are paused"
    )
    perturb_epochs: int = Field(2, ge=1, description="pbt: epochs between two comparisons of the members")
    top: int = Field(
        3, ge=0, description="this many of the best trials are retrained on other seeds to find the winner; 0 = none"
    )
    seeds: int = Field(3, ge=1, description="number of other seeds per retrained trial")
    space: dict[str, Axis] = Field({}, description='values of each searched key, e.g. "optim.learning_rate" = {...}')

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
    """Flattens nested tables to dotted keys; an axis stays a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        inner = isinstance(value, dict) and value and not _AXIS & value.keys()
        flat |= _flat(value, f"{dotted}.") if inner else {dotted: value}
    return flat
