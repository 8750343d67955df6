"""What the policy says of a datastore that is served, and what is never archived."""

from __future__ import annotations

import json

from live_datastore import MIB, SMALL_ENDS, MakeDatastore, noise

from vmfs_stub.cli.exit_codes import ExitCode


def test_what_is_protected_stays_so(make_datastore: MakeDatastore) -> None:
    """Through a rename, a restart and the loss of the catalog."""
    datastore = make_datastore(SMALL_ENDS)
    datastore.start()
    datastore.add_vm("db", noise(2 * MIB, seed=1))
    datastore.add_vm("web", noise(2 * MIB, seed=1))

    def rows() -> dict[str, tuple[bool, bool, str]]:
        found = json.loads(datastore.cli("policy", "--json", check=0).out)
        return {row["vm"]: (row["protected"], row["archives"], row["reason"]) for row in found}

    def protected() -> list[str]:
        return [row["vm"] for row in json.loads(datastore.cli("ls", "--json", check=0).out) if row["protected"]]

    protection, archives, reason = rows()["db"]
    assert (protection, archives) == (False, False)
    assert reason.startswith("not known to be off for 14 days: in use, or not known, for"), reason
    datastore.cli("protect", "db", check=0)
    assert protected() == ["db"]
    assert rows()["db"] == (True, False, "is protected; `vmfs-stub unprotect` allows to archive it")
    refused = datastore.cli("archive", "db", "web")
    assert refused.code == ExitCode.REFUSED
    assert "VM db is protected from being archived" in refused.err
    (datastore.mountpoint / "db").rename(datastore.mountpoint / "database")
    datastore.stop()
    for path in (datastore.backing / ".vmfs-stub").glob("catalog.sqlite*"):
        path.unlink()
    datastore.start()
    assert protected() == ["database"]
    assert datastore.cli("archive", "database").code == ExitCode.REFUSED
    datastore.cli("unprotect", "database", check=0)
    datastore.cli("archive", "database", check=0)
    assert rows()["database"] == (False, False, "is archived already")
    datastore.cli("recall", "database", check=0)
    assert rows()["database"][2].startswith("was recalled ")
