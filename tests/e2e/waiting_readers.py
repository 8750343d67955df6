"""Reads one block at each of many offsets of a file, all at once, and says how each ended and when.

``python waiting_readers.py PATH OFFSET…``: prints a line when all have begun, then JSON, for each offset: the
seconds that it took, errno or 0, the bytes in hex.  A process of its own, since a read that waits cannot be given up.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

BLOCK = 4096


def main() -> None:
    path, offsets = sys.argv[1], [int(each) for each in sys.argv[2:]]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    begin = threading.Barrier(len(offsets) + 1)
    found: dict[int, tuple[float, int, str]] = {}

    def read(offset: int) -> None:
        begin.wait()
        started, code, data = time.monotonic(), 0, b""
        try:
            data = os.pread(fd, BLOCK, offset)
        except OSError as exc:
            code = exc.errno
        found[offset] = (time.monotonic() - started, code, data.hex())

    threads = [threading.Thread(target=read, args=(offset,)) for offset in offsets]
    for thread in threads:
        thread.start()
    begin.wait()
    print("begun", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps([found[offset] for offset in offsets]), flush=True)


if __name__ == "__main__":
    main()
