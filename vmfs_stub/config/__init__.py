"""The configuration: one frozen object, read from a TOML file and validated once, at start.

What an operator may have to change takes its limit from here; other bounds are constants beside their use.  Unknown
keys are refused, so that a misspelt limit is not silently the default.  Must not know who uses a value, and touches no
path that it names: whether a directory exists is asked by ``init``, ``doctor`` and the daemon.

A file becomes a Config in `file.py` alone; each section is in the module that is named for what it is about.
"""

from vmfs_stub.config.config import Config
from vmfs_stub.config.datastore import RUNTIME_ROOT, refuse_nesting
from vmfs_stub.config.file import (
    DEFAULT_CONFIG_PATH,
    config_path,
    load_config,
    parse_config,
    place_of,
    read_config_text,
)
from vmfs_stub.config.hypervisor import LibvirtConfig, UsageConfig
from vmfs_stub.config.monitoring import MonitoringConfig
from vmfs_stub.config.store import ScrubConfig, StoreConfig

__all__ = [
    "DEFAULT_CONFIG_PATH",
    "RUNTIME_ROOT",
    "Config",
    "LibvirtConfig",
    "MonitoringConfig",
    "ScrubConfig",
    "StoreConfig",
    "UsageConfig",
    "config_path",
    "load_config",
    "parse_config",
    "place_of",
    "read_config_text",
    "refuse_nesting",
]
