"""Long tests: a named soak runs for a while from a seed, and every byte read is compared with a model.

A soak that fails says its seed and the number of its step; the same seed takes the same decisions again (what they
meet, such as how far hydration came, may differ).
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence

from scripts.lab import soak_churn, soak_fuzz
from scripts.lab.datastore import end_on_signals, temporary_datastore
from scripts.lab.failure import LabError

Step = Callable[[], str]
"""Does one thing and says what it was; raises LabError when something is not as it should be."""

SOAKS = {"churn": soak_churn.Churn}
"""Those that need a datastore."""
ABOUT = {name: (soak.__doc__ or "").splitlines()[0] for name, soak in SOAKS.items()} | {"fuzz": soak_fuzz.ABOUT}
_REPORT_INTERVAL_S = 30.0


def run_steps(name: str, step: Step, *, seed: int, duration_s: float, say: Callable[[str], None] = print) -> int:
    """Take steps for ``duration_s``; returns how many.  Raises LabError naming the seed and step that failed."""
    started_s = reported_s = time.monotonic()
    done, what = 0, "nothing yet"
    while time.monotonic() - started_s < duration_s:
        try:
            what = step()
        except (LabError, OSError) as exc:
            raise LabError(f"soak {name}, seed {seed}, step {done} (after {what!r}): {exc}") from exc
        done += 1
        if time.monotonic() - reported_s >= _REPORT_INTERVAL_S:
            reported_s = time.monotonic()
            say(f"{name}: {done} steps in {reported_s - started_s:.0f} s; the last: {what}")
    return done


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("soak", nargs="?", choices=sorted(ABOUT))
    parser.add_argument("--list", action="store_true", help="list the soaks and stop")
    parser.add_argument(
        "--seed", type=int, help="take the decisions of this seed (default: a new one, which is printed)"
    )
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument("--target", action="append", help="fuzz: only this target (may be repeated)")
    parser.add_argument("--replay", metavar="FILE", help="fuzz: only this input, as a finding saved it, of one target")
    options = parser.parse_args(arguments)
    if not options.list and options.soak is None:
        parser.error("name a soak; --list says which there are")
    if (options.target or options.replay) and options.soak != "fuzz":
        parser.error("--target and --replay are for the soak `fuzz`")
    return options


def main() -> None:
    """Run one soak; exit code 1 when it finds something."""
    options = parse()
    if options.list:
        for name, about in ABOUT.items():
            print(f"{name:10} {about}")
        print(f"targets of fuzz: {', '.join(soak_fuzz.names())}")
        return
    end_on_signals()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    print(f"soak {options.soak}: seed {seed}, {options.minutes:g} minutes", flush=True)
    try:
        if options.soak == "fuzz":
            soak_fuzz.fuzz(seed, duration_s=options.minutes * 60, only=options.target or (), replayed=options.replay)
            return
        kind = SOAKS[options.soak]
        with temporary_datastore(kind.settings) as datastore, kind(datastore, random.Random(seed)) as running:
            steps = run_steps(options.soak, running.step, seed=seed, duration_s=options.minutes * 60)
            running.verify_all()
    except LabError as failure:
        sys.exit(f"soak failed: {failure}")
    except KeyboardInterrupt:
        sys.exit("interrupted; everything was cleaned up")
    print(f"soak {options.soak}: {steps} steps, every byte as it should be")


if __name__ == "__main__":
    main()
