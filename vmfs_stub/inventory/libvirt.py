"""Asks libvirt, with its own binding; blocking.

Every call here may take as long as libvirtd likes, so it belongs into a thread, under somebody's limit of time
(`services.libvirt_hypervisor`).  All failures become HypervisorAway.

libvirtd is never asked for the disks of domains that are off: it would open their images to look, and that breaks the
lease of an archive in progress.  Of those it is asked for the state alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmfs_stub.core.errors import HypervisorAway, UnknownFormat
from vmfs_stub.core.usage import Counters, GuestState, Reading
from vmfs_stub.inventory.domain import ArchiveNote, Domain
from vmfs_stub.inventory.domain_xml import NOTE, NOTE_KEY, Definition, note_xml, parse_domain
from vmfs_stub.inventory.libvirt_binding import run_event_loop, said, the_binding, translated
from vmfs_stub.inventory.libvirt_stats import counters_of, operation_of, state_of

_KEEPALIVE_S: Final = 5
_KEEPALIVES_MISSED: Final = 3
"""A libvirtd that is silent for this many of them is gone: calls that wait for it fail then."""

_IS_FROZEN: Final = "the agent is in frozen state"
"""What QEMU's agent, since 6.0, answers to all questions but those of freezing while its guest is frozen."""


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something happened to a domain; ``uuid`` is None when the connection is lost.

    ``is_state`` says that it was started, stopped, suspended or the like, and not (only) changed in its definition.
    """

    uuid: str | None
    is_state: bool
    at_s: float


Told = Callable[[DomainEvent], None]
"""Is called in a thread of the binding's; must not block or raise."""


class LibvirtConnection:
    """One connection; thread-safe, since the binding is.  A lost one stays lost."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn
        self._known: dict[str, tuple[str, Definition]] = {}
        self._changes = 0

    @classmethod
    def to(cls, uri: str, told: Told) -> LibvirtConnection:
        """Connect; ``told`` hears of what happens to domains from now on.

        Raises HypervisorAway; may take for ever where libvirtd has stopped.
        """
        libvirt = the_binding()
        run_event_loop(libvirt)
        with translated(f"cannot connect to {uri}"):
            conn = libvirt.open(uri)
        try:
            with translated(f"cannot watch {uri}"):
                conn.setKeepAlive(_KEEPALIVE_S, _KEEPALIVES_MISSED)
                conn.registerCloseCallback(_on_close, told)
                _register(libvirt, conn, told)
        except HypervisorAway:
            with contextlib.suppress(libvirt.libvirtError):
                conn.close()
            raise
        return cls(conn)

    def close(self) -> None:
        """Let go of it; what fails then has no one to tell."""
        with contextlib.suppress(Exception):
            self._conn.unregisterCloseCallback()
        with contextlib.suppress(Exception):
            self._conn.close()

    def is_alive(self) -> bool:
        """Whether the connection still stands, as far as is known here; does not ask anybody."""
        with contextlib.suppress(Exception):
            return bool(self._conn.isAlive())
        return False

    def forget(self, uuid: str | None) -> None:
        """The definition of this domain, or of all, may have changed: it is read again when it is needed next."""
        self._changes += 1
        if uuid is None:
            self._known.clear()
        else:
            self._known.pop(uuid, None)

    # What there is

    def domains(self) -> list[Domain]:
        """All domains, by name; without ``state_since_s``, which nobody can ask for.  Raises HypervisorAway."""
        libvirt = the_binding()
        with translated("cannot list the domains"):
            handles = {_uuid(dom): dom for dom in self._conn.listAllDomains()}
            saved = self._having(libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)
            starting = self._having(libvirt.VIR_CONNECT_LIST_DOMAINS_AUTOSTART)
            lasting = self._having(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT)
            states = self._states()
        for uuid in set(self._known) - handles.keys():
            self._known.pop(uuid, None)
        found = []
        for uuid, dom in handles.items():
            state, reason = states.get(uuid, (GuestState.UNKNOWN, -1))
            if state is GuestState.OFF and uuid in saved:
                state = GuestState.SAVED
            domain = self._domain(dom, uuid, state, reason, is_persistent=uuid in lasting, autostarts=uuid in starting)
            if domain is not None:
                found.append(domain)
        return sorted(found, key=lambda domain: domain.name)

    def _having(self, flag: int) -> frozenset[str]:
        return frozenset(_uuid(dom) for dom in self._conn.listAllDomains(flag))

    def _states(self) -> dict[str, tuple[GuestState, int]]:
        """State and libvirt's reason of every domain, by one question."""
        libvirt = the_binding()
        found = {}
        for dom, stats in self._conn.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
            number = stats.get("state.state", -1)
            found[_uuid(dom)] = (state_of(libvirt, number), stats.get("state.reason", -1))
        return found

    def _domain(
        self, dom: Any, uuid: str, state: GuestState, reason: int, *, is_persistent: bool, autostarts: bool
    ) -> Domain | None:
        """None when it has gone meanwhile."""
        libvirt = the_binding()
        try:
            # Without it nobody knows whose disks these are, so it must not just be left out.
            xml, definition = self._known.get(uuid) or self._read(dom, uuid, is_persistent=is_persistent)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise HypervisorAway(f"cannot look at the domain {dom.name()}: {said(exc)}") from exc
        problems = self._running_problems(dom, state, reason, is_persistent=is_persistent)
        return Domain(
            uuid=uuid,
            name=definition.name,
            state=state,
            state_since_s=None,
            is_persistent=is_persistent,
            autostarts=autostarts,
            disks=definition.disks,
            nvram=definition.nvram,
            xml=xml,
            metadata=definition.metadata,
            note=definition.note,
            problems=(*problems, *definition.problems),
        )

    def _read(self, dom: Any, uuid: str, *, is_persistent: bool) -> tuple[str, Definition]:
        libvirt, changes = the_binding(), self._changes
        # Without VIR_DOMAIN_XML_SECURE: passwords in it stay on this host.
        xml = dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if is_persistent else 0)
        try:
            definition = parse_domain(xml, volume_path=self._volume_path)
        except UnknownFormat as exc:
            definition = Definition(uuid, dom.name(), (), None, {}, None, (str(exc),))
        # Where a volume lies may be known later, and what has changed meanwhile is read again.
        if changes == self._changes and all(disk.kind != "volume" for disk in definition.disks):
            self._known[uuid] = (xml, definition)
        return xml, definition

    def _running_problems(self, dom: Any, state: GuestState, reason: int, *, is_persistent: bool) -> list[str]:
        """What only libvirtd knows; a domain that is off is not asked."""
        libvirt = the_binding()
        found = [] if is_persistent else ["it is transient: libvirt forgets it when it stops"]
        if state.is_off:
            if reason == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED:
                found.append("it was migrated to another host, where its newest state is")
            return found
        try:
            job = dom.jobStats(0)
            if job.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE:
                found.append(f"libvirt runs a job on it: {operation_of(libvirt, job.get('operation', 0))}")
            if "<mirror" in (xml := dom.XMLDesc(0)):
                live = parse_domain(xml)
                found += [problem for problem in live.problems if problem.endswith("has a block job running")]
        except (libvirt.libvirtError, UnknownFormat) as exc:  # it has just stopped, say
            if not self.is_alive():
                raise HypervisorAway(f"cannot look at the domain {dom.name()}: {exc}") from exc
            found.append(f"what it does cannot be told: {exc}")
        return found

    def _volume_path(self, pool: str, name: str) -> Path | None:
        libvirt = the_binding()
        try:
            path = self._conn.storagePoolLookupByName(pool).storageVolLookupByName(name).path()
        except libvirt.libvirtError:
            return None  # of a pool that is not active, too
        return Path(path) if path.startswith("/") else None

    # How it is used

    def readings(self) -> Mapping[str, Reading]:
        """What every domain has used, by two questions: one for all that run, one for the states of the others."""
        libvirt = the_binding()
        wanted = (
            libvirt.VIR_DOMAIN_STATS_STATE
            | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
            | libvirt.VIR_DOMAIN_STATS_VCPU
            | libvirt.VIR_DOMAIN_STATS_BLOCK
            | libvirt.VIR_DOMAIN_STATS_INTERFACE
        )
        # One that has a long job running is left out in part, instead of having all wait for it.
        flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
        with translated("cannot read what the domains have used"):
            states = self._states()
            saved = self._having(libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)
            running = {_uuid(dom): stats for dom, stats in self._conn.getAllDomainStats(wanted, flags)}
        at_s = time.time()
        found = {}
        for uuid, (state, _reason) in states.items():
            if state is GuestState.OFF and uuid in saved:
                state = GuestState.SAVED  # noqa: PLW2901
            counters = counters_of(running[uuid]) if uuid in running and not state.is_off else Counters()
            found[uuid] = Reading(at_s, state, counters)
        return found

    # What is to be done

    def state(self, uuid: str) -> GuestState:
        """Of one domain."""
        libvirt = the_binding()
        with translated("cannot ask for the state of a domain"):
            dom = self._lookup(uuid)
            state = state_of(libvirt, dom.state()[0])
            return GuestState.SAVED if state is GuestState.OFF and dom.hasManagedSaveImage() else state

    def ask_to_power_off(self, uuid: str) -> None:
        """Press the guest's power button (ACPI); returns at once."""
        libvirt = the_binding()
        with translated("cannot ask a domain to power off"):
            self._lookup(uuid).shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

    def save(self, uuid: str) -> None:
        """Put a guest's memory into libvirt's save directory and end it; takes as long as the memory is large."""
        with translated("cannot save a domain"):
            self._lookup(uuid).managedSave(0)

    def stop_saving(self, uuid: str) -> None:
        """Stop a save that takes too long: the guest goes on.  Whatever else libvirt does with it is not stopped."""
        libvirt = the_binding()
        with translated("cannot stop the save of a domain"):
            dom = self._lookup(uuid)
            if dom.isActive() and dom.jobStats(0).get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE:
                dom.abortJob()

    def start(self, uuid: str) -> None:
        """Start a domain, from its managed save if it has one; one that runs is left alone."""
        with translated("cannot start a domain"):
            dom = self._lookup(uuid)
            if not dom.isActive():
                dom.create()

    def has_agent(self, uuid: str) -> bool:
        """Whether an agent in the guest answers, and can be asked to freeze; asking for the time changes nothing.

        Not so while somebody else has frozen the guest, who will thaw it, and relies on that until then.
        """
        libvirt = the_binding()
        with translated("cannot ask the agent of a guest"):
            dom = self._lookup(uuid)
            try:
                dom.getTime()
            except libvirt.libvirtError as exc:
                # All else, as that this very question is forbidden, is an answer.
                return _IS_FROZEN not in said(exc) and exc.get_error_code() not in (
                    libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
                    libvirt.VIR_ERR_AGENT_UNSYNCED,
                    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
                    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                    libvirt.VIR_ERR_NO_SUPPORT,
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    libvirt.VIR_ERR_OPERATION_TIMEOUT,
                    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                )
        return True

    def freeze(self, uuid: str) -> None:
        """Have the guest's agent freeze all its filesystems.

        Raises HypervisorAway: they may be frozen, now or in a while, also where it is the agent that does not answer.
        """
        with translated("cannot freeze the filesystems of a guest"):
            self._lookup(uuid).fsFreeze()

    def thaw(self, uuid: str) -> None:
        """Undo `freeze`; a guest that is not frozen stays so.  Raises HypervisorAway unless its agent says so."""
        with translated("cannot thaw the filesystems of a guest"):
            self._lookup(uuid).fsThaw()

    def set_note(self, uuid: str, note: ArchiveNote | None) -> None:
        """Write, or remove, our note in the domain's metadata: in its definition, and in what runs of it."""
        libvirt = the_binding()
        with translated("cannot change the metadata of a domain"):
            dom = self._lookup(uuid)
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if dom.isPersistent() else 0
            if dom.isActive():
                flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
            element = libvirt.VIR_DOMAIN_METADATA_ELEMENT
            try:
                dom.setMetadata(element, note and note_xml(note), note and NOTE_KEY, NOTE, flags)
            except libvirt.libvirtError as exc:
                if note is not None or exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    raise
        self.forget(uuid)

    def _lookup(self, uuid: str) -> Any:
        return self._conn.lookupByUUID(bytes.fromhex(uuid))


def _on_close(_conn: object, _reason: int, told: Told) -> None:
    told(DomainEvent(None, is_state=True, at_s=time.time()))


def _register(libvirt: Any, conn: Any, told: Told) -> None:
    """Everything that changes what `domains` says."""

    def changed(_conn: object, dom: Any, *_: object) -> None:
        told(DomainEvent(_uuid(dom), is_state=False, at_s=time.time()))

    def lived(_conn: object, dom: Any, event: int, *_: object) -> None:
        is_state = event not in (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_UNDEFINED)
        told(DomainEvent(_uuid(dom), is_state=is_state, at_s=time.time()))

    conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lived, None)
    for number in (
        libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
        libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
        libvirt.VIR_DOMAIN_EVENT_ID_DISK_CHANGE,
        libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
        libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
        libvirt.VIR_DOMAIN_EVENT_ID_TRAY_CHANGE,
    ):
        conn.domainEventRegisterAny(None, number, changed, None)


def _uuid(dom: Any) -> str:
    return bytes(dom.UUID()).hex()
