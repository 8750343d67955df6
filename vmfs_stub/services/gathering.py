"""Before a job: files that belong to one VM by what domains say by now are made files of that VM.

Those of one domain at the top become one VM (`vm_groups`), and the memory of a saved guest that of its VM.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from vmfs_stub.core.errors import HypervisorAway, PrimaryError, Unsupported
from vmfs_stub.core.usage import GuestState
from vmfs_stub.inventory.directory import DirectoryInventory
from vmfs_stub.inventory.domain import Domain
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.managed_save import IMAGE_SUFFIX
from vmfs_stub.services.situation import Situation
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.vm_groups import VmGroups

log = logging.getLogger(__name__)


class Gathering:
    """Gathers the files of one datastore's VMs; ``look`` sees what is so now."""

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        threads: Threads,
        inventory: DirectoryInventory,
        groups: VmGroups,
        look: Callable[[], Awaitable[Situation]],
    ) -> None:
        self._hypervisor = hypervisor
        self._threads = threads
        self._inventory = inventory
        self._groups = groups
        self._look = look

    async def run(self) -> None:
        """Have files that are one domain's be one VM from now on; where that cannot be told they stay what they are."""
        try:
            domains = await self._hypervisor.domains()
            if not domains:
                return
            situation = await self._look()
            if await self._groups.regroup(situation.scan.vms, domains, situation.chains):
                situation = await self._look()
            await self._threads.files(self._give_memory, situation, domains)
        except (HypervisorAway, PrimaryError, Unsupported) as exc:
            log.info("which files belong together stays as it is known: %s", exc)

    def _give_memory(self, situation: Situation, domains: Sequence[Domain]) -> None:
        """The memory of a guest that is saved is its VM's."""
        by_id = {vm.id: vm for vm in situation.scan.vms}
        for domain in domains:
            owners = situation.links.vms_of(domain.uuid)
            if domain.state is GuestState.SAVED and owners:
                self._inventory.give_memory(by_id[owners[0]], f"{domain.name}{IMAGE_SUFFIX}")
