"""The configuration: typed sections, and loading them from TOML with overrides."""

from recray.config.data import (
    ColumnsConfig,
    DataConfig,
    FeatureConfig,
    MovielensConfig,
    NegativesConfig,
    SimulatedConfig,
    SplitConfig,
)
from recray.config.load import load_config, parse_config, with_values
from recray.config.schema import (
    Config,
    EmbeddingConfig,
    EvaluationConfig,
    LossConfig,
    ModelOptions,
    OptimConfig,
    RetrievalConfig,
    RunConfig,
    ScalingConfig,
    TrainingConfig,
)
from recray.config.section import Section
from recray.config.tune import Axis, TuneConfig

__all__ = [
    "Axis",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "FeatureConfig",
    "LossConfig",
    "ModelOptions",
    "MovielensConfig",
    "NegativesConfig",
    "OptimConfig",
    "RetrievalConfig",
    "RunConfig",
    "ScalingConfig",
    "Section",
    "SimulatedConfig",
    "SplitConfig",
    "TrainingConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "with_values",
]
