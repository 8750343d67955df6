"""Every way in which vmfs-stub fails, as one tree.

Purpose: a caller tells failures apart by type, never by message.  Foreign exceptions (OSError, obstore, sqlite)
are translated at the edge of the adapter that met them, with ``raise ... from exc``.

    VmfsStubError
    ├── ConfigError              the configuration or an argument cannot be used
    ├── NotFound
    │   ├── VmNotFound           no VM of that name or id
    │   ├── AmbiguousName        a name that several VMs have; the message lists them
    │   └── PointNotFound        no such restore point
    ├── Refused                  possible, but not now, or not without being told to
    │   ├── InUse                somebody has a disk of the VM open
    │   ├── Abandoned            somebody opened or changed something of the VM during the job
    │   ├── RecallsHeld          `hold` is in force for this datastore
    │   ├── Protected            `protect` says that the VM is never to be archived
    │   ├── PointPinned          placeholders depend on the restore point
    │   ├── ClaimedElsewhere     the newest state of the VM is in another datastore
    │   ├── DatastoreLocked      another daemon, here or on another host, serves this backing directory
    │   ├── OtherDatastore       the daemon that answers serves another one
    │   ├── AlreadyExists        would overwrite something
    │   └── Unsupported          this kernel, filesystem or store cannot do what is needed
    ├── StoreError
    │   ├── ObjectMissing        the store has no such object
    │   ├── ObjectExists         a conditional put lost
    │   ├── StoreUnavailable     no answer, or a refusal that may pass; retried by the store wrapper
    │   ├── StoreDenied          credentials or permissions
    │   ├── StoreConflict        garbage collection takes away what a job uses; run it again
    │   ├── WrongStore           another store than the one that has these bytes
    │   └── StoreFull            the store has no room left
    ├── StoreKeyError            an encrypted store cannot be opened with what was given
    │   ├── KeyMissing           no key was given
    │   └── WrongKey             it is not a key of this store
    ├── IntegrityError           something read is not what was written
    │   ├── CorruptFrame
    │   ├── CorruptPack
    │   ├── CorruptSegment
    │   ├── CorruptManifest
    │   ├── CorruptStoreObject   any other object of the store (index, pin, mark, store description)
    │   ├── CorruptRecord        the placeholder record in the xattr, or the file with the datastore's id
    │   ├── CorruptMap           a residency map
    │   ├── MapMissing           a record without the map that belongs to it
    │   ├── RecordMissing        a map without the record that belongs to it
    │   └── IdentityMismatch     a record that was made for another inode (a copied placeholder)
    ├── UnknownFormat            written by a newer version, or not by vmfs-stub
    ├── RecallError
    │   ├── RecallTimeout        the deadline passed before the bytes were back
    │   └── RecallOverload       too many recalls wait already
    ├── PrimaryError
    │   ├── NoSpace              the backing filesystem (or the floor of free space) leaves no room
    │   ├── HistoryLost          the catalog was lost: jobs and usage until now are forgotten
    │   ├── PrimaryIOError       a file call on the backing filesystem failed
    │   └── MapFrozen            a sync of this disk failed; what it covered is no longer certain
    ├── HypervisorAway           libvirt does not answer, or refused what was asked of it
    ├── MoverLost                the process that moves data ended in the middle of it
    └── DaemonUnreachable        no daemon answers on the control socket
"""

from __future__ import annotations

from typing import Final


class VmfsStubError(Exception):
    """Base of all failures; the message names the VM or file, what was tried and what the operator can do."""


class ConfigError(VmfsStubError):
    """The configuration or an argument cannot be used."""


class NotFound(VmfsStubError):
    """Something that was named does not exist."""


class VmNotFound(NotFound):
    """No VM has that name or id."""


class AmbiguousName(NotFound):
    """Several VMs have that name."""


class PointNotFound(NotFound):
    """The VM has no such restore point."""


class Refused(VmfsStubError):
    """Possible, but not now, or not without being told to."""


class InUse(Refused):
    """Somebody has a disk of the VM open."""


class Abandoned(Refused):
    """Somebody opened, changed, renamed or replaced something of the VM during the job."""


class RecallsHeld(Refused):
    """`hold` is in force for this datastore."""


class Protected(Refused):
    """An operator has said that the VM is never to be archived."""


class PointPinned(Refused):
    """Placeholders depend on the restore point."""


class ClaimedElsewhere(Refused):
    """The newest state of the VM is in another datastore, or was taken over by one."""


class DatastoreLocked(Refused):
    """Another daemon, here or on another host, serves this backing directory."""


class OtherDatastore(Refused):
    """The daemon that answers serves another backing directory than the one that was meant."""


class AlreadyExists(Refused):
    """Would overwrite something."""


class Unsupported(Refused):
    """This kernel, filesystem or store cannot do what is needed."""


class StoreError(VmfsStubError):
    """Secondary storage did not do what was asked."""


class ObjectMissing(StoreError):
    """The store has no such object."""


class ObjectExists(StoreError):
    """A conditional put found the name taken."""


class StoreUnavailable(StoreError):
    """No answer, or a refusal that may pass."""


class StoreDenied(StoreError):
    """Credentials or permissions do not allow it."""


class StoreConflict(StoreError):
    """Garbage collection takes away something that a job refers to; the job must run again."""


class WrongStore(StoreError):
    """What is needed is in another store than the one that is here."""


class StoreFull(StoreError):
    """The store has no room left."""


class StoreKeyError(VmfsStubError):
    """An encrypted store cannot be opened with the key that was given, if any."""


class KeyMissing(StoreKeyError):
    """The store is encrypted, and no key was given."""


class WrongKey(StoreKeyError):
    """What was given is not a key of this store."""


class IntegrityError(VmfsStubError):
    """Something read is not what was written; it is never used."""


class CorruptFrame(IntegrityError):
    """A frame does not decode to the chunk it should hold."""


class CorruptPack(IntegrityError):
    """A pack is truncated or its footer is damaged."""


class CorruptSegment(IntegrityError):
    """A segment does not match its name or cannot be parsed."""


class CorruptManifest(IntegrityError):
    """A manifest does not match its checksum or cannot be parsed."""


class CorruptStoreObject(IntegrityError):
    """Another object of the store is damaged."""


class CorruptRecord(IntegrityError):
    """A placeholder record, or the file with the datastore's id, is damaged."""


class CorruptMap(IntegrityError):
    """A residency map is damaged."""


class MapMissing(IntegrityError):
    """A placeholder whose residency map is gone."""


class RecordMissing(IntegrityError):
    """A residency map whose file has lost its placeholder record."""


class IdentityMismatch(IntegrityError):
    """A placeholder record that was made for another inode."""


class UnknownFormat(VmfsStubError):
    """Written by a newer version, or not by vmfs-stub at all."""


DAMAGE: Final = (IntegrityError, ObjectMissing, UnknownFormat)
"""What is wrong with data, and not with the place that it is in; the last may be damage of what says the format."""


class RecallError(VmfsStubError):
    """Absent bytes could not be brought back in time."""


class RecallTimeout(RecallError):
    """The deadline passed before the bytes were back."""


class RecallOverload(RecallError):
    """Too many recalls wait already."""


class PrimaryError(VmfsStubError):
    """The backing filesystem did not do what was asked."""


class NoSpace(PrimaryError):
    """The backing filesystem, or its floor of free space, leaves no room."""


class HistoryLost(PrimaryError):
    """The catalog was lost and begun anew: jobs and usage until then are forgotten, bytes never."""


class PrimaryIOError(PrimaryError):
    """A file call on the backing filesystem failed."""


class MapFrozen(PrimaryError):
    """A sync of this disk failed; what it covered is no longer certain."""


class HypervisorAway(VmfsStubError):
    """The hypervisor does not answer, or refused what was asked of it."""


class MoverLost(VmfsStubError):
    """The process that moves data ended in the middle of it, or could not be started; nothing half done is left."""


class DaemonUnreachable(VmfsStubError):
    """No daemon answers on the control socket."""
