-- The catalog: what this host remembers about its VMs, jobs and accesses.
--
-- Nothing here is needed to bring bytes back: a lost catalog costs history and usage, never data.  It is written by
-- one process, the daemon that holds the datastore's lock.  All times are seconds since the epoch (REAL).  Run on an older
-- catalog, after migrations.py has changed the tables that it has, this adds those that it lacks.

PRAGMA user_version = 3;

-- VMs that an inventory scan has met.
CREATE TABLE IF NOT EXISTS vms (
    id          TEXT PRIMARY KEY CHECK (length(id) = 32),   -- VmId
    name        TEXT NOT NULL,                              -- the newest name, printable
    first_seen  REAL NOT NULL,
    last_seen   REAL NOT NULL,                              -- a VM that is gone keeps its row
    last_point  REAL                                        -- when its newest restore point was made; NULL: none is known
) STRICT, WITHOUT ROWID;

-- Jobs: backup, archive, recall, adopt, rehearsal.
CREATE TABLE IF NOT EXISTS jobs (
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

CREATE INDEX IF NOT EXISTS jobs_by_start ON jobs (started DESC);

-- The last open of a disk, by who opened it: a hypervisor's open says that a VM is used, an indexer's does not.
CREATE TABLE IF NOT EXISTS access (
    vm          TEXT NOT NULL CHECK (length(vm) = 32),      -- VmId
    disk        TEXT NOT NULL,                              -- path relative to the VM
    executable  TEXT NOT NULL,                              -- '' when it could not be read
    uid         INTEGER NOT NULL,
    opened      REAL NOT NULL,
    PRIMARY KEY (vm, disk, executable, uid)
) STRICT, WITHOUT ROWID;

-- Samples: how VMs were used (core/usage.py says what a sample is).  There is no row for time in which nobody looked.
-- Their times are whole milliseconds, since there are many of them, and what is rounded is rounded up.

-- VMs that samples are of, and when a hypervisor last used them, as far as the mount saw it.
CREATE TABLE IF NOT EXISTS sampled_vms (
    number      INTEGER PRIMARY KEY,                        -- stands for the VM in samples, whose rows are many
    vm          TEXT NOT NULL UNIQUE CHECK (length(vm) = 32),   -- VmId
    last_open   REAL,
    last_io     REAL
) STRICT;

-- At most some 2,200 rows per VM with a sample each five minutes: fresh ones for two days, hours for 35 days, days for
-- two years; 1,000 VMs take about 200 MB.
CREATE TABLE IF NOT EXISTS samples (
    vm          INTEGER NOT NULL,                           -- sampled_vms.number
    tier        INTEGER NOT NULL CHECK (tier IN (0, 1, 2)), -- 2: fresh, 1: of about an hour, 0: of about a day
    start       INTEGER NOT NULL,                           -- ms since the epoch
    length      INTEGER NOT NULL,                           -- ms
    off         INTEGER NOT NULL,                           -- ms in which it is known to have been off,
    running     INTEGER NOT NULL,                           -- … to have run; the rest is unknown
    cpu_max     INTEGER,                                    -- hundredths of a percent of one processor; NULL: unknown
    disk_max    INTEGER,                                    -- bytes per second
    network_max INTEGER,                                    -- bytes per second
    cpu         INTEGER NOT NULL,                           -- ms
    read        INTEGER NOT NULL,                           -- bytes
    written     INTEGER NOT NULL,                           -- bytes
    requests    INTEGER NOT NULL,
    network     INTEGER NOT NULL,                           -- bytes
    PRIMARY KEY (vm, tier, start)
) STRICT, WITHOUT ROWID;

-- What each domain had used when it was last looked: a daemon that starts again goes on from there.
CREATE TABLE IF NOT EXISTS readings (
    domain      TEXT PRIMARY KEY,                           -- its UUID, 32 hex digits
    at          REAL NOT NULL,
    state       TEXT NOT NULL,
    since       REAL,                                       -- NULL: nobody knows
    cpu         REAL,
    read        INTEGER,
    written     INTEGER,
    requests    INTEGER,
    network     INTEGER
) STRICT, WITHOUT ROWID;

-- How much of primary was free, about once an hour, for as long as it tells when primary will be full.
CREATE TABLE IF NOT EXISTS free_space (
    at          REAL PRIMARY KEY,
    free_bytes  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What is still to be done to the catalog itself: 'rebuild' while facts about VMs are to be taken from store and primary.
CREATE TABLE IF NOT EXISTS due (
    name        TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

INSERT OR IGNORE INTO due (name) VALUES ('rebuild');
