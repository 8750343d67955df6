"""The daemon as one of another host: ``python other_host_daemon.py MACHINE --config FILE mount``.

It says that it runs on that machine, and keeps its serving mark at a quicker pace.
"""

from __future__ import annotations

import sys
from functools import partial

from vmfs_stub import daemon
from vmfs_stub.cli.main import main
from vmfs_stub.primary.serving_mark import Machine, Pace

PACE = Pace(interval_s=0.5, held_s=2, still_s=4)

if __name__ == "__main__":
    machine = Machine(sys.argv.pop(1), "ab" * 16, "host-of-the-test")
    daemon.run = partial(daemon.run, machine=machine, pace=PACE)
    main()
