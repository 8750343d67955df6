"""Puts this folder on the import path, so that all kinds of tests share the fakes in it."""

from __future__ import annotations

import os

# tmp_path on a filesystem that a backing directory can be on: /tmp may be tmpfs.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
