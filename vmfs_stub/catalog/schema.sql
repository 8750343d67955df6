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
    last_seen   REAL NOT NULL                               -- a VM that is gone keeps its row
) STRICT, WITHOUT ROWID;

-- Jobs: backup, archive, recall, adopt, rehearsal.
CREATE TABLE jobs (
    id          TEXT PRIMARY KEY CHECK (length(id) = 32),   -- JobId
    kind        TEXT NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'cancelled', 'interrupted')),
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
