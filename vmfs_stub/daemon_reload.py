"""What happens in the daemon when its configuration is read again: everybody who has a value of it gets the new one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import trio

from vmfs_stub.config import Config
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.core.errors import ConfigError, StoreDenied, StoreError, VmfsStubError
from vmfs_stub.daemon_settings import fetch_bytes_max, service_settings, store_places
from vmfs_stub.datastore import Datastore
from vmfs_stub.mover.client import ProcessMover
from vmfs_stub.services.bandwidth import Bandwidth
from vmfs_stub.services.disk_services import DiskServices
from vmfs_stub.services.findings import Findings
from vmfs_stub.settings import Settings, Take
from vmfs_stub.store.clients import StoreClients
from vmfs_stub.store.keys import STORE_KEY
from vmfs_stub.store.objects import ObjectStore
from vmfs_stub.store.store import Store

log = logging.getLogger(__name__)


def follow(
    settings: Settings,
    *,
    services: DiskServices,
    jobs: Jobs,
    clients: StoreClients,
    store: Store,
    mover: ProcessMover,
    findings: Findings,
    bandwidth: Bandwidth,
    datastore: Datastore,
) -> None:
    """Give everybody who has a value of the configuration the new one when it is reloaded."""
    slot_bytes = max(fetch_bytes_max(settings.current), store.chunk_size)

    async def prepare_limits(new: Config) -> Take:
        limits = service_settings(new)
        # What the mover fetches lies in memory whose size was chosen at the start.
        limits = replace(limits, fetch_bytes_max=min(limits.fetch_bytes_max, slot_bytes))

        def take() -> None:
            services.apply(limits)
            datastore.apply(new)
            bandwidth.windows = new.jobs.bandwidth
            jobs.running_max, jobs.kept = new.control.jobs_running_max, new.control.jobs_kept
            findings.settle("configuration", ConfigError)

        return take

    async def prepare_clients(new: Config) -> Take:
        places = store_places(new)
        prepared = clients.prepare(*places)
        for name, objects in (("store", prepared.store), ("replica", prepared.replica)):
            if objects is not None:
                await trio.to_thread.run_sync(_refuse_denied, name, objects)

        def take() -> None:
            if prepared.is_change:
                prepared.take()
                mover.ask_like(*places)

        return take

    settings.follow(prepare_limits)
    settings.follow(prepare_clients)


def _refuse_denied(name: str, objects: ObjectStore) -> None:
    """Raise ConfigError when new credentials are refused; a place that is away may accept them when it is back."""
    try:
        objects.size(STORE_KEY)
    except StoreDenied as exc:
        raise ConfigError(f"the credentials in [{name}] are refused ({exc}); nothing was changed") from exc
    except StoreError as exc:
        log.warning("whether the %s takes the new credentials cannot be told: %s", name, exc)


async def reload_on_hangup(settings: Settings, hangups: AsyncIterator[int], findings: Findings) -> None:
    """What `reload` does, at each SIGHUP; nobody waits for the answer, so what is wrong becomes a finding."""
    async for _ in hangups:
        try:
            await settings.reload()
        except VmfsStubError as exc:
            log.warning("the configuration could not be read again: %s", exc)
            told = f"SIGHUP asked for a reload, and nothing was changed: {exc}; correct it and try again"
            findings.add("configuration", ConfigError(told), stays=False, severity="warning")
