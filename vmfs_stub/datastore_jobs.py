"""Which jobs there are: those that run, recent ones, and those of earlier daemons."""

from __future__ import annotations

from vmfs_stub.catalog.catalog import Catalog
from vmfs_stub.control.jobs import Jobs
from vmfs_stub.control.messages import JobInfo
from vmfs_stub.core.errors import NotFound
from vmfs_stub.core.ids import JobId
from vmfs_stub.datastore_listing import only_warned
from vmfs_stub.datastore_reports import job_of
from vmfs_stub.services.threads import Threads

LISTED_MAX = 200
"""Jobs that are listed, each with its report; older ones have to be named."""


class KnownJobs:
    """All jobs of one datastore, of whatever kind."""

    def __init__(self, *, threads: Threads, catalog: Catalog, jobs: Jobs) -> None:
        self._threads = threads
        self._catalog = catalog
        self._jobs = jobs

    async def job(self, job_id: JobId, *, wait_s: float) -> JobInfo:
        """State of one job when it has ended, or after so many seconds; raises NotFound."""
        try:
            return await self._jobs.wait(job_id, wait_s=wait_s)
        except NotFound:
            record = await self._threads.files(self._catalog.job, job_id)
            if record is None or (info := job_of(record)) is None:
                raise
            return info

    async def all(self) -> list[JobInfo]:
        """Running and recent jobs, those of earlier daemons included, newest first."""
        found = self._jobs.list()
        known = {job.id for job in found}
        with only_warned("the jobs of earlier daemons could not be read"):
            kept = await self._threads.files(self._catalog.jobs, count_max=LISTED_MAX)
            found += [info for record in kept if record.id not in known and (info := job_of(record)) is not None]
        return sorted(found, key=lambda job: job.started, reverse=True)[:LISTED_MAX]

    async def cancel(self, job_id: JobId) -> None:
        """Tell a running job to end; raises NotFound, Refused."""
        self._jobs.cancel(job_id)
