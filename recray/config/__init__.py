"""The configuration: typed sections, and loading them from TOML with overrides."""

from recray.config.load import load_config, parse_config
from recray.config.sections import (
    ColumnsConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FeatureConfig,
    LossConfig,
    ModelOptions,
    MovielensConfig,
    NegativesConfig,
    OptimConfig,
    RetrievalConfig,
    RunConfig,
    ScalingConfig,
    Section,
    SimulatedConfig,
    SplitConfig,
    TrainingConfig,
)

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
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
    "load_config",
    "parse_config",
]
