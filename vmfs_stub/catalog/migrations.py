"""How the tables of an earlier catalog become those of today: by schema version, the step to the next one.

A step is SQL that runs in one transaction with all that follow it; schema.sql has what comes out.  Steps are never
changed once they were released.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_CANCELLED = """
CREATE TABLE jobs_new (
    id          TEXT PRIMARY KEY CHECK (length(id) = 32),
    kind        TEXT NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'cancelled', 'interrupted')),
    vms         TEXT NOT NULL CHECK (json_valid(vms)),
    caller_uid  INTEGER NOT NULL,
    started     REAL NOT NULL,
    ended       REAL,
    report      TEXT CHECK (report IS NULL OR json_valid(report)),
    error       TEXT CHECK (error IS NULL OR json_valid(error))
) STRICT, WITHOUT ROWID;
INSERT INTO jobs_new SELECT id, kind, state, vms, caller_uid, started, ended, report, error FROM jobs;
DROP TABLE jobs;
ALTER TABLE jobs_new RENAME TO jobs;
CREATE INDEX jobs_by_start ON jobs (started DESC);
"""
"""Jobs can be cancelled."""

MIGRATIONS: Mapping[int, str] = MappingProxyType({1: _CANCELLED})
