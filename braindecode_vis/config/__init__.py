"""The configuration of a run: which component plays each role, with which settings.

`registry` finds the components; `source` reads YAML and applies dotted overrides, which are validated again;
`wording` turns what pydantic found into one sentence; `files` looks whether named files are there.
"""

from braindecode_vis.config.files import check_files
from braindecode_vis.config.models import (
    EvaluationConfig,
    RepeatsConfig,
    RetrievalConfig,
    RunConfig,
    list_analyses,
    make_analysis,
)
from braindecode_vis.config.source import dump_config, find_config, read_config
from braindecode_vis.config.wording import describe_validation_error, validate_config
from braindecode_vis.registry import list_kinds

__all__ = [
    "EvaluationConfig",
    "RepeatsConfig",
    "RetrievalConfig",
    "RunConfig",
    "check_files",
    "describe_validation_error",
    "dump_config",
    "find_config",
    "list_analyses",
    "list_kinds",
    "make_analysis",
    "read_config",
    "validate_config",
]
