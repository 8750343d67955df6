-- What came with version 2 of the catalog: how VMs were used (core/usage.py says what a sample is).
--
-- There is no row of samples for time in which nobody looked.  All times are seconds since the epoch (REAL), but those
-- of samples, of which there are many: they are whole milliseconds, and what is rounded is rounded up.

PRAGMA user_version = 2;

-- VMs that samples are of, and when a hypervisor last used them, as far as the mount saw it.
CREATE TABLE sampled_vms (
    number      INTEGER PRIMARY KEY,                        -- stands for the VM in samples, whose rows are many
    vm          TEXT NOT NULL UNIQUE CHECK (length(vm) = 32),   -- VmId
    last_open   REAL,
    last_io     REAL
) STRICT;

-- At most some 2,200 rows per VM with a sample each five minutes: fresh ones for two days, hours for 35 days, days for
-- two years; 1,000 VMs take about 200 MB.
CREATE TABLE samples (
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
CREATE TABLE readings (
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
