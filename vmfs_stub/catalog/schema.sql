-- The catalog: what this host remembers about its VMs, jobs and accesses.
--
-- Nothing here is needed to bring bytes back: a lost catalog costs history and usage, never data.  It is written by
-- one process, the daemon that holds the datastore's lock.  All times are seconds since the epoch (REAL).

PRAGMA user_version = 2;

-- VMs that an inventory scan has met.
CREATE TABLE vms (
    id          TEXT PRIMARY KEY CHECK (length(id) = 32),   -- VmId
    name        TEXT NOT NULL,                              -- the newest name, printable
    first_seen  REAL NOT NULL,
    last_seen   REAL NOT NULL,                              -- a VM that is gone keeps its row
    last_point     REAL,                                    -- when its newest restore point was made; NULL: none is known
    last_archived  REAL,                                    -- when it was last made a placeholder
    last_recalled  REAL                                     -- when a disk of it last became an ordinary file again
) STRICT, WITHOUT ROWID;

-- Jobs: backup, archive, recall.
CREATE TABLE jobs (
    id          TEXT PRIMARY KEY CHECK (length(id) = 32),   -- JobId
    kind        TEXT NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
    vms         TEXT NOT NULL CHECK (json_valid(vms)),      -- JSON list of the VMs asked for; [] means all
    caller_uid  INTEGER NOT NULL,                           -- user at the other end of the control socket
    started     REAL NOT NULL,
    ended       REAL,                                       -- NULL while it runs
    report      TEXT CHECK (report IS NULL OR json_valid(report)),            -- JSON object: what was done, per VM
    error       TEXT CHECK (error IS NULL OR json_valid(error))              -- JSON {"error": class, "message": text} when it failed
) STRICT, WITHOUT ROWID;

CREATE INDEX jobs_by_start ON jobs (started DESC);

-- The last open of a disk, by who opened it: a hypervisor's open says that a VM is used, an indexer's does not.
CREATE TABLE access (
    vm          TEXT NOT NULL CHECK (length(vm) = 32),      -- VmId
    disk        TEXT NOT NULL,                              -- path relative to the VM
    executable  TEXT NOT NULL,                              -- '' when it could not be read
    uid         INTEGER NOT NULL,
    opened      REAL NOT NULL,
    PRIMARY KEY (vm, disk, executable, uid)
) STRICT, WITHOUT ROWID;

-- How much of primary was free, about once an hour, for as long as it tells when primary will be full.
CREATE TABLE free_space (
    at          REAL PRIMARY KEY,
    free_bytes  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What is still to be done to the catalog itself: 'rebuild' while facts about VMs are to be taken from store and primary.
CREATE TABLE due (
    name        TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

INSERT INTO due (name) VALUES ('rebuild');
