"""How a VM of the datastore is and was used, for `usage`; and the sampler that finds it out."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.config import Config
from vmfs_stub.control.messages import UsageSpan, VmUsage
from vmfs_stub.core.usage import DAY_S, GAP_INTERVALS, HOUR_S, GuestState, Sample, spans
from vmfs_stub.inventory.vm import Scan, Vm
from vmfs_stub.services.domains import LinkDomains
from vmfs_stub.services.hypervisor import Hypervisor
from vmfs_stub.services.mount_usage import MountUsage
from vmfs_stub.services.threads import Threads
from vmfs_stub.services.usage import UsageSampler

BY_HOURS_DAYS_MAX = 2
"""Of so many days a line is an hour, of more a day."""
GAP_SHARE = 0.01
"""What of a line may be missing before it is two, with a gap between: all of it that is unknown is told anyway."""


class Usage:
    """What `usage` shows; ``sampler`` has work of its own that goes on beside the datastore's."""

    def __init__(
        self,
        *,
        config: Config,
        threads: Threads,
        catalog: Catalog,
        hypervisor: Hypervisor,
        mount_usage: MountUsage,
        link: LinkDomains,
        scan: Callable[[], Awaitable[Scan]],
    ) -> None:
        self._threads = threads
        self._catalog = catalog
        self._interval_s = config.usage.interval_s
        self.sampler = UsageSampler(
            catalog=catalog,
            threads=threads,
            hypervisor=hypervisor,
            link=link,
            mount=mount_usage,
            scan=scan,
            interval_s=config.usage.interval_s,
        )

    async def of_vm(self, vm: Vm, *, days: int) -> VmUsage:
        """How it was used in the last ``days``.  Raises PrimaryIOError."""
        now_s = time.time()
        since_s = now_s - days * DAY_S
        samples = await self._threads.files(partial(self._catalog.samples, vm.id, since_s=since_s, until_s=now_s))
        resolution_s = HOUR_S if days <= BY_HOURS_DAYS_MAX else DAY_S
        shown = spans(samples, resolution_s=resolution_s, gap_s=resolution_s * GAP_SHARE)
        reading, use = self.sampler.reading(vm.id), self.sampler.last_use(vm.id)
        links = self.sampler.links
        return VmUsage(
            vm=vm.name,
            vm_id=vm.id,
            state=GuestState.UNKNOWN.value if reading is None else reading.state.value,
            state_since=None if reading is None else reading.state_since_s,
            last_open=use.open_s,
            last_io=use.io_s,
            domains=[] if links is None else [domain.name for domain in links.of(vm.id)],
            # What came after the last sample is a gap only when another one should have come.
            spans=list(_with_gaps(list(shown), since_s, now_s, late_s=GAP_INTERVALS * self._interval_s)),
        )


def _with_gaps(shown: Sequence[Sample], since_s: float, until_s: float, *, late_s: float) -> Iterator[UsageSpan]:
    seen_s = since_s
    for sample in shown:
        if sample.start_s > seen_s:
            yield _gap(seen_s, sample.start_s)
        yield _span(sample)
        seen_s = sample.end_s
    if until_s - seen_s > late_s:
        yield _gap(seen_s, until_s)


def _gap(start_s: float, end_s: float) -> UsageSpan:
    return UsageSpan(start=start_s, end=end_s, is_gap=True, unknown_s=end_s - start_s)


def _span(sample: Sample) -> UsageSpan:
    is_told = sample.running_s > 0 and (sample.cpu_s > 0 or sample.cpu_percent_max is not None)
    return UsageSpan(
        start=sample.start_s,
        end=sample.end_s,
        off_s=sample.off_s,
        running_s=sample.running_s,
        unknown_s=max(0.0, sample.end_s - sample.start_s - sample.off_s - sample.running_s),
        cpu_percent=100 * sample.cpu_s / sample.running_s if is_told else None,
        cpu_percent_max=sample.cpu_percent_max,
        disk_bytes_per_s_max=sample.disk_bytes_per_s_max,
        network_bytes_per_s_max=sample.network_bytes_per_s_max,
        read_bytes=sample.read_bytes,
        written_bytes=sample.written_bytes,
        requests=sample.requests,
        network_bytes=sample.network_bytes,
    )
