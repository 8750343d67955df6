"""Runs a target on mutated inputs and says what broke; the same seed makes the same inputs again.

An input whose outcome was not seen before (where it was refused, which lines it reached) is kept, and mutated further.
Each target runs in a process of its own with bounded address space, so that a crash, a hang or the use of too much
memory is a finding like any other.  Run as a module it prints its results as JSON lines, for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.fuzz.mutation import SIZE_MAX, Mutator
from tests.fuzz.target import Target, Violation

HANG_S: Final = 15.0
ADDRESS_SPACE_BYTES: Final = 1 << 30
"""What a target's process may map beyond what it has, looked at anew every so often."""
INPUTS_A_BOUND: Final = 10_000
"""How often that is: each measurement of memory loses some hundred bytes in the interpreter, which an hour adds up."""
MEASURED_EVERY: Final = 16
"""Memory is measured for one input in so many: that makes a call several times slower."""
TRACED_EVERY: Final = 8
CORPUS_MAX: Final = 400
FINDINGS_MAX: Final = 20
_PACKAGE: Final = f"{os.sep}vmfs_stub{os.sep}"
_SLOT_BYTES: Final = 8 * SIZE_MAX


class _Hang(BaseException):
    """The call was not done in time."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that an input broke; ``signature`` is the same for the same bug, ``data`` is the input."""

    target: str
    signature: str
    detail: str
    data: bytes


@dataclass(slots=True)
class Result:
    """What a campaign did: ``accepted`` of ``executions`` inputs were decoded, the rest was refused as documented."""

    target: str
    executions: int = 0
    accepted: int = 0
    corpus: int = 0
    elapsed_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)


class Campaign:
    """Mutates, calls and judges; one target, one seed."""

    def __init__(self, target: Target, seed: int, *, announce: Callable[[bytes], None] = lambda data: None) -> None:
        self._target = target
        self._seed = seed
        self._announce = announce
        self._corpus = target.seeds()
        self._pristine = len(self._corpus)
        self._known = {self._fingerprint_of_seed(data) for data in self._corpus}
        self._outcomes: set[object] = set()
        self._lines: set[tuple[str, int]] = set()
        self._inputs = itertools.count()
        self.result = Result(target.name, corpus=self._pristine)

    def run(self, *, count: int, duration_s: float | None = None) -> bool:
        """Call the target ``count`` times more, unless it was called for ``duration_s`` already or much is found.

        Whether there may be more to do.  The time is this process's time on a processor, so that a busy machine tries
        no fewer inputs.
        """
        started_s = time.process_time() - self.result.elapsed_s
        for index in itertools.islice(self._inputs, count):
            self._step(index)
            self.result.elapsed_s = time.process_time() - started_s
            if len(self.result.findings) >= FINDINGS_MAX:
                return False
            if duration_s is not None and self.result.elapsed_s >= duration_s:
                return False
        return True

    def _step(self, index: int) -> None:
        data, is_sealed = self._input(random.Random(f"{self._target.name}/{self._seed}/{index}"))
        self._announce(data)
        lines = self._lines if index % TRACED_EVERY == 0 else None
        seen_lines = len(self._lines)
        measured = index % MEASURED_EVERY == 1
        self.result.executions += 1
        outcome, value, finding = judge(self._target, data, lines=lines, is_measured=measured)
        if finding is not None:
            self._found(finding)
            return
        if outcome is None:
            self.result.accepted += 1
            fingerprint = _fingerprint(value)
            if self._target.is_checked and not is_sealed and fingerprint not in self._known:
                detail = "damage was not detected: another value was read from bytes whose checksum was not mended"
                self._found(Finding(self._target.name, "damage not detected", detail, data))
                return
        if (outcome, is_sealed) in self._outcomes and len(self._lines) == seen_lines:
            return
        self._outcomes.add((outcome, is_sealed))
        if len(self._corpus) < CORPUS_MAX:
            self._corpus.append(data)
            self.result.corpus += 1
            if outcome is None:
                self._known.add(fingerprint)

    def _input(self, chance: random.Random) -> tuple[bytes, bool]:
        """The next input, and whether its checksums were made right."""
        target = self._target
        mutator = Mutator(chance, target.tokens)
        is_sealed = chance.random() < 0.75
        isolated = target.is_checked and target.is_mixable and not is_sealed
        count = self._pristine if isolated or chance.random() < 0.4 else len(self._corpus)
        data = self._corpus[chance.randrange(count)]
        edited = target.edit_json(data, mutator.json_of) if chance.random() < 0.8 else None
        if edited is None:
            edited = mutator.bytes_of(data, None if isolated else self._corpus[chance.randrange(len(self._corpus))])
        edited = edited[:SIZE_MAX]
        return (target.reseal(edited), True) if is_sealed else (edited, False)

    def _fingerprint_of_seed(self, data: bytes) -> bytes:
        """A seed that breaks a rule is a mistake of the target, and ends the campaign."""
        try:
            return _fingerprint(self._target.call(data))
        except self._target.permitted as exc:
            return _fingerprint(exc)

    def _found(self, finding: Finding) -> None:
        if all(finding.signature != other.signature for other in self.result.findings):
            self.result.findings.append(finding)


def judge(
    target: Target,
    data: bytes,
    *,
    lines: set[tuple[str, int]] | None = None,
    is_measured: bool = True,
    is_repeated: bool = False,
) -> tuple[object, object, Finding | None]:
    """Call the target once: where it refused the input (None when it did not), what it returned, and what it broke.

    ``lines`` gets the lines of the program that were run; ``is_measured`` says whether memory is looked at.
    """
    value: object = None
    outcome: object = None
    error: BaseException | None = None
    if is_measured:
        tracemalloc.start()
    cpu_s = time.process_time()
    try:
        with _alarm(HANG_S), _traced(lines):
            value = target.call(data)
    except target.permitted as exc:
        outcome = _place(exc)
    except (Exception, _Hang) as exc:
        error = exc
    cpu_s = time.process_time() - cpu_s
    peak = 0
    if is_measured:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if error is not None:
        text = "".join(traceback.format_exception(error))[-3000:]
        signature = error.rule if isinstance(error, Violation) else _place(error)[-1]
        return outcome, value, Finding(target.name, signature, text, data)
    bound = target.bound
    allowed = bound.base_bytes + bound.per_byte * len(data)
    if peak > allowed and not is_repeated:  # what is made once, such as a cache, is no cost of the input
        return judge(target, data, lines=lines, is_repeated=True)
    if peak > allowed:
        detail = f"{peak} bytes of memory for an input of {len(data)}, where {allowed} are allowed"
        return outcome, value, Finding(target.name, "memory", detail, data)
    if cpu_s > bound.cpu_s * (1 if lines is None and not is_measured else 10):
        detail = f"{cpu_s:.2f} s of CPU for an input of {len(data)} bytes"
        return outcome, value, Finding(target.name, "time", detail, data)
    return outcome, value, None


def _fingerprint(value: object) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _place(error: BaseException) -> tuple[str, ...]:
    """Types and places of an error and its causes; the places are in the program where there is one."""
    found: list[str] = []
    at: BaseException | None = error
    while at is not None and len(found) < 8:
        frames = traceback.extract_tb(at.__traceback__)
        ours = [frame for frame in frames if _PACKAGE in frame.filename] or list(frames)[-1:]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        found.append(f"{type(at).__name__} {where}")
        at = at.__cause__
    return tuple(found)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left_s)  # that of a test around this


@contextlib.contextmanager
def _traced(lines: set[tuple[str, int]] | None) -> Iterator[None]:
    if lines is None:
        yield
        return

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if _PACKAGE in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


# In processes of their own


def run_apart(kind: type[Target], seed: int, *, count: int | None = None, duration_s: float | None = None) -> Result:
    """Run a campaign in a child process; whatever ends that process is a finding too.

    The caller must have no threads: the child is a fork.
    """
    slot = mmap.mmap(-1, 16 + _SLOT_BYTES)
    reader, writer = os.pipe()
    place = Path(tempfile.mkdtemp(prefix="vmfs-stub-fuzz-", dir=_fast_directory()))
    try:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(kind, seed, count, duration_s, slot, writer, place)
        os.close(writer)
        writer = -1
        status, answer = _await_child(pid, reader, slot)
    finally:
        # Not shutil: a fault may leave a tree that is too deep for Python.
        subprocess.run(["rm", "-rf", "--", place], check=True)
        for descriptor in (reader, writer):
            if descriptor >= 0:
                os.close(descriptor)
    length = int.from_bytes(slot[8:16], "little")
    executions, last = int.from_bytes(slot[:8], "little"), slot[16 : 16 + length]
    slot.close()
    if answer:
        return _result_of(answer)
    how = (
        f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.waitstatus_to_exitcode(status)}"
    )
    finding = Finding(kind.name, f"the process ended: {how}", f"while it read this input ({how})", last)
    return Result(kind.name, executions=executions, findings=[finding])


def _child(
    kind: type[Target],
    seed: int,
    count: int | None,
    duration_s: float | None,
    slot: mmap.mmap,
    writer: int,
    place: Path,
) -> None:
    """Never returns."""
    code = 1
    try:
        logging.disable(logging.CRITICAL if not kind.name.startswith("control") else logging.NOTSET)
        logging.getLogger().addHandler(logging.NullHandler())
        logging.lastResort = None
        executions = 0

        def announce(data: bytes) -> None:
            nonlocal executions
            executions += 1
            slot[:16] = executions.to_bytes(8, "little") + len(data).to_bytes(8, "little")
            slot[16 : 16 + len(data)] = data

        target = kind(place)
        try:
            campaign = Campaign(target, seed, announce=announce)
            more = True
            while more and (count is None or executions < count):
                most = INPUTS_A_BOUND if count is None else min(INPUTS_A_BOUND, count - executions)
                with bounded_address_space():
                    more = campaign.run(count=most, duration_s=duration_s)
        finally:
            target.close()
        with os.fdopen(writer, "wb") as file:
            file.write(_text_of(campaign.result).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _await_child(pid: int, reader: int, slot: mmap.mmap) -> tuple[int, bytes]:
    """How the child ended and what it wrote; it is killed when it is stuck in a call for long."""
    os.set_blocking(reader, False)
    answer = bytearray()
    seen, since_s = b"", time.monotonic()
    while True:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(reader, 1 << 16):
                answer += part
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            while part := os.read(reader, 1 << 16):
                answer += part
            return status, bytes(answer)
        if slot[:8] != seen:
            seen, since_s = slot[:8], time.monotonic()
        elif time.monotonic() - since_s > 4 * HANG_S:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@contextlib.contextmanager
def bounded_address_space(extra_bytes: int = ADDRESS_SPACE_BYTES) -> Iterator[None]:
    """Nothing inside may map more than ``extra_bytes`` beyond what is mapped now: MemoryError instead."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _fast_directory() -> str | None:
    """Memory where there is such a filesystem: nothing here must survive."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _text_of(result: Result) -> str:
    body = asdict(result)
    for finding in body["findings"]:
        finding["data"] = finding["data"].hex()
    return json.dumps(body)


def _result_of(answer: bytes) -> Result:
    body = json.loads(answer)
    findings = [Finding(**{**finding, "data": bytes.fromhex(finding["data"])}) for finding in body.pop("findings")]
    return Result(**body, findings=findings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run targets one after the other; one line of JSON for each."""
    from tests.fuzz.registry import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__)
    parser.add_argument("target", nargs="+", metavar="TARGET:COUNT", help="which targets, and how many inputs of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for text in options.target:
        name, _, count = text.partition(":")
        result = run_apart(TARGETS[name], options.seed, count=int(count))
        sys.stdout.write(_text_of(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
