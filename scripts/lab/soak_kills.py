"""Kills: the real daemon is killed again and again, in use and at work, and every byte is compared with memory.

Five disks of four VMs are written and read by several threads each, while VMs are archived, backed up, recalled and
renamed.  The kill comes at a random moment, or one that is aimed at; sometimes it meets the data mover alone, or the
next daemon while it starts.  The seed and the number of the life decide everything but what the kill meets.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from scripts.lab.daemon_process import PROGRAM, DaemonProcess
from scripts.lab.datastore import Datastore, Settings, datastore_in, with_settings, working_directory
from scripts.lab.failure import LabError
from scripts.lab.kill_disk import KillDisk, Naming
from scripts.lab.kill_end import check_end
from scripts.lab.kill_jobs import LifeJob, Point, run_job
from scripts.lab.kill_plan import Condition, Life, Start, plan_life
from scripts.lab.kill_sight import Sight, map_states
from vmfs_stub.config import load_config
from vmfs_stub.control.messages import JobKind
from vmfs_stub.core.errors import VmfsStubError

KILLS: Final = 300
"""How many unless told."""
_DISKS: Final = (
    ("one", "a.raw", 3_000_000),
    ("one", "b.raw", 1 << 20),
    ("two", "disk.raw", 4 << 20),
    ("three", "disk.raw", (2 << 20) + 4097),
    ("four", "disk.raw", 5_000_123),
)
SETTINGS: Final[Settings] = {
    "archive": {"resident_head_bytes": 0, "resident_tail_bytes": 0, "placeholder_bytes_min": "64 KiB"},
    "primary": {"sync_interval_s": 0.3},
}
_JOBS: Final[Mapping[Condition, JobKind]] = {"archived": "archive", "backed up": "backup", "recalled": "recall"}
_START_DEADLINE_S: Final = 20.0
"""From its launch to its first answer, on a busy machine too."""
_AIM_DEADLINE_S: Final = 1.5
_JOB_DEADLINE_S: Final = 60.0
_WHOLE_CHANCE: Final = 0.6
_WHOLE_LIVES_MAX: Final = 3
"""Else a disk's untouched bytes, which would all be recalled by it, are left for a later life to compare."""
_MOVER_GONE: Final = "data mover (process "
"""What the daemon may log as an error: that the data mover was killed, and what ended with it."""
_REPORT_INTERVAL_S: Final = 30.0


class Kills:
    """The disks of a datastore through many lives; as a context it ends with the daemon dead."""

    def __init__(self, datastore: Datastore, seed: int, *, program: Sequence[str | Path] = PROGRAM) -> None:
        self._datastore = datastore
        self._seed = seed
        self._daemon = DaemonProcess(datastore, program=program)
        self._config = load_config(datastore.config)
        self._maps = self._config.private_dir / "maps"
        self._disks = [
            KillDisk(vm, name, size=size, mountpoint=datastore.mountpoint, backing=datastore.backing)
            for vm, name, size in _DISKS
        ]
        self._vms = list(dict.fromkeys(disk.vm for disk in self._disks))
        self._not_whole = dict.fromkeys((disk.label for disk in self._disks), 0)
        self._jobs: list[LifeJob] = []
        self._points: list[Point] = []
        self._counts: Counter[str] = Counter()
        self._starts_s: list[float] = []
        self._lives = 0
        self._what = "the beginning"
        self.kills = 0

    def __enter__(self) -> Self:
        self._daemon.launch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._daemon.kill()

    def run(self, kills: int, *, say: Callable[[str], None] = print) -> str:
        """So many kills, then the end; what was done.  Raises LabError when anything is not as it should be."""
        began_s = reported_s = time.monotonic()
        with self._told():
            self._answered()
            for disk in self._disks:
                disk.create(random.Random(f"{self._seed} {disk.label}"))
        while self.kills < kills:
            with self._told():
                self._live()
            if time.monotonic() - reported_s >= _REPORT_INTERVAL_S:
                reported_s = time.monotonic()
                say(f"kills: {self.kills} in {reported_s - began_s:.0f} s; the last: {self._what}")
        lived_s = time.monotonic() - began_s
        with self._told():
            self._what = "the end"
            self._prepare(set())
            check_end(self._datastore, self._daemon, self._disks, self._points)
        return self._summary(lived_s)

    # One life

    def _live(self) -> None:
        chance = random.Random(f"{self._seed} {self._lives}")
        life = plan_life(chance, self._vms)
        self._what = str(life)
        self._prepare({vm for vm, condition in life.conditions.items() if condition in ("placeholder", "recalled")})
        self._jobs = []
        sight = Sight(self._disks, self._jobs, maps=self._maps, client=self._daemon.client)
        doom = threading.Event()
        self._begin(life, doom)
        self._wait(life, sight, chance)
        if life.victim == "daemon":
            self._kill_daemon(doom)
            self._finish_use()
            self._start_again(life, chance)
        else:
            self._kill_mover()
            self._wait_jobs()
            self._finish_use()
        self._check(chance)
        self._lives += 1

    def _prepare(self, placeholders: set[str]) -> None:
        """Make anew what is gone, and archive what is to be a placeholder: the jobs can be made again."""
        for disk in self._disks:
            if disk.is_gone:
                disk.create(random.Random(f"{self._seed} {self._lives} {disk.label}"))
                self._counts["disks made anew"] += 1
        for vm in sorted(placeholders):
            if {row.state for row in self._daemon.client.list_disks(vm)} != {"placeholder"}:
                run_job(self._daemon.client, "archive", vm)
                self._counts["archived before"] += 1

    def _begin(self, life: Life, doom: threading.Event) -> None:
        for vm, condition in life.conditions.items():
            disks = [disk for disk in self._disks if disk.vm == vm]
            naming = life.naming if condition == "named" else None
            open_vm = partial(self._open_vm, disks, naming=naming, doom=doom)
            kind = _JOBS.get(condition)
            if kind in (None, "recall"):
                open_vm()
            if kind is not None:
                self._jobs.append(LifeJob(self._daemon.client, vm, kind, disks, open_vm, life.opened_s.get(vm)))

    def _open_vm(self, disks: Sequence[KillDisk], *, naming: Naming | None, doom: threading.Event) -> None:
        for disk in disks:
            disk.begin(f"{self._seed} {self._lives}", doom=doom, naming=naming)

    def _wait(self, life: Life, sight: Sight, chance: random.Random) -> None:
        """Until the moment of the kill."""
        until_s = time.monotonic() + _AIM_DEADLINE_S
        looked_s = 0.0
        while not (seen := sight.sees(life.aim)) and time.monotonic() < until_s:
            if time.monotonic() - looked_s > 0.02:
                looked_s = time.monotonic()
                self._look_at_jobs()
            time.sleep(0.0003)
        self._counts[f"{life.victim}: {life.aim}{'' if seen else ', not seen in time'}"] += 1
        until_s = time.monotonic() + life.delay_s
        while (left_s := until_s - time.monotonic()) > 0:
            if left_s > 0.03:
                self._look_at_jobs()
            time.sleep(min(0.02, max(0.0, until_s - time.monotonic())))

    def _look_at_jobs(self, *, may_lose_mover: bool = False) -> bool:
        over = [job.look(may_lose_mover=may_lose_mover) for job in self._jobs]  # each of them, whatever others say
        return all(over)

    def _kill_daemon(self, doom: threading.Event) -> None:
        doom.set()
        self._daemon.kill()
        self.kills += 1
        self._counts.update(f"met map {state.name.lower()}" for state in map_states(self._maps))
        for disk in self._disks:
            for lane in disk.lanes:
                if lane.change is not None:
                    self._counts[f"met {lane.change.what.split(' ')[0]}"] += 1

    def _kill_mover(self) -> None:
        if not self._daemon.kill_mover():
            self._counts["no mover to kill"] += 1
        self.kills += 1

    def _wait_jobs(self) -> None:
        until_s = time.monotonic() + _JOB_DEADLINE_S
        while not self._look_at_jobs(may_lose_mover=True):
            if time.monotonic() > until_s:
                raise LabError(f"a job is still running {_JOB_DEADLINE_S:g} s after the data mover was killed")
            time.sleep(0.01)

    def _finish_use(self) -> None:
        for disk in self._disks:
            disk.finish()
        for job in self._jobs:
            self._counts[f"{job.kind} {job.outcome or 'cut short'}"] += 1
            if job.point is not None:
                self._points.append(job.point)

    def _start_again(self, life: Life, chance: random.Random) -> None:
        text = with_settings(self._datastore.config.read_text(), {"hydration": life.hydration})
        self._datastore.config.write_text(text)
        for start in life.starts:
            self._daemon.launch()
            self._wait_within(start)
            self._daemon.kill()
            self.kills += 1
            self._counts["start killed"] += 1
        self._daemon.launch()
        self._answered()

    def _wait_within(self, start: Start) -> None:
        until_s = time.monotonic() + _START_DEADLINE_S
        own = str(self._daemon.pid)
        while start.after_lock and self._config.lock_path.read_text().split() != [own]:
            if not self._daemon.is_running or time.monotonic() > until_s:
                raise LabError(f"the daemon does not lock the datastore:\n{self._daemon.log_tail()}")
            time.sleep(0.001)
        time.sleep(start.delay_s)
        if not self._daemon.is_running:
            raise LabError(f"the daemon ended instead of starting:\n{self._daemon.log_tail()}")

    def _answered(self) -> None:
        self._starts_s.append(self._daemon.wait_answers(deadline_s=_START_DEADLINE_S))

    def _check(self, chance: random.Random) -> None:
        """The daemon says that all is well, and every byte is what it should be."""
        status = self._daemon.client.status()
        if not status.healthy or status.findings or status.store.last_error or not status.mount.mounted:
            raise LabError(f"status: {status.model_dump_json(indent=1)}")
        for disk in self._disks:
            disk.settle()
            whole = chance.random() < _WHOLE_CHANCE or self._not_whole[disk.label] >= _WHOLE_LIVES_MAX
            disk.compare(whole=whole)
            self._not_whole[disk.label] = 0 if whole or disk.is_gone else self._not_whole[disk.label] + 1
            self._counts["disks compared whole" if whole else "disks compared where they were changed"] += 1
        lines = self._daemon.new_log().splitlines()
        if wrong := [line for line in lines if "Traceback" in line or (" ERROR " in line and _MOVER_GONE not in line)]:
            raise LabError(f"the daemon's log has {wrong[0]}")

    # Telling

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A failure says where it was, and what was last done; what memory holds is left beside the datastore."""
        try:
            yield
        except (LabError, VmfsStubError, OSError) as exc:
            under_way = [f"  {disk.label}: {disk.change_under_way()}" for disk in self._disks]
            operations = [disk.last_operations() for disk in self._disks]
            folder = self._datastore.home / "memory"
            for disk in self._disks:
                (folder / disk.vm).mkdir(parents=True, exist_ok=True)
                (folder / disk.label).write_bytes(disk.content())
            raise LabError(
                "\n".join(
                    [
                        f"kills, seed {self._seed}, life {self._lives}, kill {self.kills} ({self._what}):",
                        f"{type(exc).__name__}: {exc}",
                        "under way:",
                        *under_way,
                        "the last operations:",
                        *operations,
                        "the daemon's log:",
                        self._daemon.log_tail(),
                    ]
                )
            ) from exc

    def _summary(self, lived_s: float) -> str:
        operations = sum((disk.counts() for disk in self._disks), Counter[str]())
        beside = sum(disk.compared_in_use for disk in self._disks)
        counts = "".join(f"\n  {what}: {count}" for what, count in sorted(self._counts.items()))
        return (
            f"{self.kills} kills in {self._lives} lives, {lived_s / self.kills:.2f} s each, nothing was wrong; "
            f"{operations.total()} operations ({_listed(operations)}), {beside} reads beside them; "
            f"from start to answer {statistics.median(self._starts_s):.2f} s, at most {max(self._starts_s):.2f} s; "
            f"{len(self._points)} restore points with known contents{counts}"
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common())


class KillSoak:
    """Kills of the real daemon, and of its data mover, under use by many threads."""

    about = "The real daemon is killed in use and at work, hundreds of times; every byte is compared with memory."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How often."""
        parser.add_argument("--kills", type=int, default=KILLS, help=f"how many (default {KILLS})")
        parser.add_argument(
            "--keep", metavar="DIR", type=Path, help="make the datastore in this new directory, and leave it there"
        )

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Raises LabError naming seed, life and kill."""
        with (
            _directory(options.keep) as home,
            datastore_in(home, SETTINGS) as datastore,
            Kills(datastore, seed) as running,
        ):
            return running.run(options.kills)


@contextmanager
def _directory(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with working_directory(Path("/var/tmp")) as home:
            yield home
        return
    try:
        kept.mkdir(parents=True)
    except FileExistsError as exc:
        raise LabError(f"{kept} is there already; name a new directory") from exc
    yield kept.resolve()
