"""The whole run as frozen dataclasses: YAML in, overrides, one finalize, one validate."""

from megascale.config.derive import Layout, finalize, validate
from megascale.config.load import dump_config, load_config, parse_config
from megascale.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GrowthConfig,
    ModelConfig,
    MoeConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    PlannerConfig,
    RunConfig,
    SeenConfig,
    SegmentConfig,
    SourceConfig,
    StageConfig,
    StartConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "GrowthConfig",
    "Layout",
    "ModelConfig",
    "MoeConfig",
    "MonitorConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlannerConfig",
    "RunConfig",
    "SeenConfig",
    "SegmentConfig",
    "SourceConfig",
    "StageConfig",
    "StartConfig",
    "TrainConfig",
    "dump_config",
    "finalize",
    "load_config",
    "parse_config",
    "validate",
]
