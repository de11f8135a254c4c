"""The whole run as frozen dataclasses: YAML in, overrides, one finalize, one validate."""

from megascale.config.derive import finalize
from megascale.config.layout import Layout
from megascale.config.load import dump_config, load_config, parse_config
from megascale.config.schema import (
    CheckpointConfig,
    DataConfig,
    EarlierConfig,
    EvalConfig,
    GrowthConfig,
    ModelConfig,
    MoeConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    PlannerConfig,
    ReadConfig,
    RopeScalingConfig,
    RunConfig,
    SegmentConfig,
    SourceConfig,
    SpikeConfig,
    StageConfig,
    StartConfig,
    TrainConfig,
)
from megascale.config.validation import validate, validate_on_cuda

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EarlierConfig",
    "EvalConfig",
    "GrowthConfig",
    "Layout",
    "ModelConfig",
    "MoeConfig",
    "MonitorConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlannerConfig",
    "RopeScalingConfig",
    "ReadConfig",
    "RunConfig",
    "SegmentConfig",
    "SpikeConfig",
    "SourceConfig",
    "StageConfig",
    "StartConfig",
    "TrainConfig",
    "dump_config",
    "finalize",
    "load_config",
    "parse_config",
    "validate",
    "validate_on_cuda",
]
