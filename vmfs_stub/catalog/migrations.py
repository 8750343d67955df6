"""How the tables of an earlier catalog become those of today: by schema version, the step to the next one.

A step is SQL that runs in one transaction with all that follow it and with schema.sql, which adds the tables that are
new.  Steps are never changed once they were released.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_FACTS_ABOUT_VMS = """
ALTER TABLE vms ADD COLUMN last_point REAL;
ALTER TABLE vms ADD COLUMN last_archived REAL;
ALTER TABLE vms ADD COLUMN last_recalled REAL;
"""
_JOBS_CAN_BE_CANCELLED = """
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
"""
_FACTS_THAT_THE_FILES_TELL = """
ALTER TABLE vms DROP COLUMN last_archived;
ALTER TABLE vms DROP COLUMN last_recalled;
"""

MIGRATIONS: Mapping[int, str] = MappingProxyType(
    {1: _FACTS_ABOUT_VMS + _JOBS_CAN_BE_CANCELLED, 2: _FACTS_THAT_THE_FILES_TELL}
)
