"""The configuration of a run: which component plays each role, with which settings.

`models` defines the settings and which of them can be combined; `source` reads YAML, applies dotted overrides and
validates; `explain` describes settings, lists weights and checks that files exist; `header` reads the
comment at the top. Components are found by `braindecode_vis.base.registry`.
"""

from braindecode_vis.base.registry import list_kinds
from braindecode_vis.config.explain import check_files, list_weights
from braindecode_vis.config.header import ConfigHeader, read_header
from braindecode_vis.config.models import (
    EvaluationConfig,
    RepeatsConfig,
    RetrievalConfig,
    RunConfig,
    list_analyses,
    make_analysis,
)
from braindecode_vis.config.source import dump_config, find_config, list_shipped, read_config, validate_config

__all__ = [
    "ConfigHeader",
    "EvaluationConfig",
    "RepeatsConfig",
    "RetrievalConfig",
    "RunConfig",
    "check_files",
    "dump_config",
    "find_config",
    "list_analyses",
    "list_kinds",
    "list_shipped",
    "list_weights",
    "make_analysis",
    "read_config",
    "read_header",
    "validate_config",
]
