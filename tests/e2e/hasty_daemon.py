"""The command line of a daemon that looks again at once for a store that was away, not after half a minute."""

from __future__ import annotations

from vmfs_stub import datastore_rebuild, datastore_status
from vmfs_stub.cli.main import main

if __name__ == "__main__":
    datastore_rebuild.RETRY_INTERVAL_S = 0.5  # type: ignore[misc]
    datastore_status.PROBE_INTERVAL_S = 0.5
    main()
