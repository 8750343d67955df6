"""The one exception of the laboratory, and running a command so that its failure is readable."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class LabError(Exception):
    """Something that the laboratory needs did not work; the message says what, and what to do."""


def run(
    command: Sequence[str | Path],
    *,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    allowed: Sequence[int] = (0,),
) -> str:
    """Run a command to its end and return its stdout.

    Raises LabError with the last lines of its output when its exit code is not ``allowed``, or it is not done after
    ``deadline_s``.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env=env,
            cwd=cwd,
        )
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"{' '.join(words)!r} was not done after {deadline_s:g} s") from exc
    except FileNotFoundError as exc:
        raise LabError(f"{words[0]} is not installed; scripts/setup installs what the laboratory needs") from exc
    if done.returncode not in allowed:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise LabError(f"{' '.join(words)!r} failed with exit code {done.returncode}:\n{tail}")
    return done.stdout
