"""Who reads the store in small steps: commands do, the daemon does not, since a guest waits for what it reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.live_datastore import MIB, QUIET, LiveDatastore, MakeDatastore, forget_pages, noise
from vmfs_stub.paced_io import STEP_BESIDE_GUESTS_BYTES

_SIZE = 16 * MIB
_VERIFY = """
import sys
from vmfs_stub.cli.main import main
try:
    main()
finally:
    print(open("/proc/self/io").read())
"""


def reads(text: str) -> int:
    """Read calls of a process, by what /proc says of its I/O."""
    found = re.search(r"syscr: (\d+)", text)
    assert found is not None
    return int(found[1])


def verify_reads(live: LiveDatastore) -> int:
    """Read calls of `verify`, all in all."""
    words = [sys.executable, "-c", _VERIFY, "--config", str(live.config), "verify"]
    return reads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_commands_read_in_steps_and_the_daemon_at_once(make_datastore: MakeDatastore) -> None:
    live = make_datastore(QUIET)
    live.start()
    path = live.add_vm("web", noise(_SIZE, seed=2))
    before = verify_reads(live)
    live.archive("web")
    assert verify_reads(live) - before >= _SIZE // STEP_BESIDE_GUESTS_BYTES
    forget_pages(path)
    assert live.daemon is not None
    io = Path(f"/proc/{live.daemon.pid}/io")
    at_start = reads(io.read_text())
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in range(0, _SIZE, MIB):
            os.pread(fd, MIB, offset)
    finally:
        os.close(fd)
    # Requests of the kernel and frames: a call for each chunk and more; each step of 32 KiB would be one besides.
    assert reads(io.read_text()) - at_start < _SIZE // STEP_BESIDE_GUESTS_BYTES
