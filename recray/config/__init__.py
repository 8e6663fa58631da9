"""The configuration: typed sections, and loading them from TOML with overrides."""

from recray.config.baselines import BaselineOptions, RecentPopularityOptions
from recray.config.data import ColumnsConfig, DataConfig, FeatureConfig, NegativesConfig, SplitConfig
from recray.config.evaluation import EvaluationConfig, PromotionConfig, ReportConfig
from recray.config.load import load_config, parse_config, with_values
from recray.config.losses import LossOptions, RankerLossOptions, RetrievalLossOptions, SampledLossOptions
from recray.config.models import EmbeddingConfig, HistoryOptions, ModelOptions, RankerOptions
from recray.config.schema import (
    Config,
    OptimConfig,
    RetrievalConfig,
    RunConfig,
    ScalingConfig,
    TrainingConfig,
)
from recray.config.section import Section
from recray.config.sources import SimulatedOptions, SourceOptions
from recray.config.trackers import TrackerOptions, TrackingConfig
from recray.config.tune import Axis, TuneConfig

__all__ = [
    "Axis",
    "BaselineOptions",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "FeatureConfig",
    "HistoryOptions",
    "LossOptions",
    "ModelOptions",
    "NegativesConfig",
    "OptimConfig",
    "PromotionConfig",
    "RankerLossOptions",
    "RankerOptions",
    "RecentPopularityOptions",
    "ReportConfig",
    "RetrievalConfig",
    "RetrievalLossOptions",
    "RunConfig",
    "SampledLossOptions",
    "ScalingConfig",
    "Section",
    "SimulatedOptions",
    "SourceOptions",
    "SplitConfig",
    "TrackerOptions",
    "TrackingConfig",
    "TrainingConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "with_values",
]
