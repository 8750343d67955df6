"""What a catalog of the first version was."""

SCHEMA_1 = """
CREATE TABLE vms (id TEXT PRIMARY KEY CHECK (length(id) = 32), name TEXT NOT NULL, first_seen REAL NOT NULL,
    last_seen REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (id TEXT PRIMARY KEY CHECK (length(id) = 32), kind TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
    vms TEXT NOT NULL CHECK (json_valid(vms)), caller_uid INTEGER NOT NULL, started REAL NOT NULL, ended REAL,
    report TEXT CHECK (report IS NULL OR json_valid(report)), error TEXT CHECK (error IS NULL OR json_valid(error))
) STRICT, WITHOUT ROWID;
CREATE INDEX jobs_by_start ON jobs (started DESC);
CREATE TABLE access (vm TEXT NOT NULL CHECK (length(vm) = 32), disk TEXT NOT NULL, executable TEXT NOT NULL,
    uid INTEGER NOT NULL, opened REAL NOT NULL, PRIMARY KEY (vm, disk, executable, uid)) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
"""
