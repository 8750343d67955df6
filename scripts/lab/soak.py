"""Long tests: a named soak runs for a while from a seed.

A soak that fails says its seed and what it was doing; the same seed takes the same decisions again (what they meet,
such as how far hydration came, may differ).
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from scripts.lab.datastore import end_on_signals
from scripts.lab.failure import LabError
from scripts.lab.soak_churn import Churn
from scripts.lab.soak_fsx import Fsx
from scripts.lab.soak_fuzz import FuzzSoak
from scripts.lab.soak_guests import GuestsSoak
from scripts.lab.soak_hosts import HostsSoak
from scripts.lab.soak_kills import KillSoak
from scripts.lab.soak_seeds import SeedSoak
from scripts.lab.soak_sites import SiteSoak
from scripts.lab.soak_starts import StartsSoak
from scripts.lab.soak_steps import StepSoak
from tests.collection import hosts
from tests.fault import racing_guests
from tests.model import play


class Soak(Protocol):
    """One long test; ``about`` says in a line what it does."""

    about: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of its own."""

    def run(self, options: argparse.Namespace, seed: int) -> str:
        """Run it and return what is to be said at the end; raises LabError when it finds something."""


_MODEL = "Random lives of a datastore with kills and power losses, every byte compared with memory."
_COLLECTION = "Garbage collection beside backups of hosts that stop for long, with lagging lists and late requests."

_POLICY = "Guests that are started at a random step of the job that archives their VM."

SOAKS: Mapping[str, Soak] = {
    "collection": SeedSoak("collection", hosts.play, about=_COLLECTION),
    "churn": StepSoak("churn", Churn),
    "fsx": StepSoak("fsx", Fsx),
    "fuzz": FuzzSoak(),
    "guests": GuestsSoak(),
    "hosts": HostsSoak(),
    "kills": KillSoak(),
    "model": SeedSoak("model", play.play, about=_MODEL, has_place=True),
    "policy": SeedSoak("policy", racing_guests.play_alone, about=_POLICY),
    "sites": SiteSoak(),
    "starts": StartsSoak(),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the soaks and stop")
    of_soaks = parser.add_subparsers(dest="soak", metavar="SOAK")
    for name, soak in SOAKS.items():
        one = of_soaks.add_parser(name, help=soak.about, description=soak.about)
        one.add_argument("--seed", type=int, help="take this seed's decisions (default: a new one, which is printed)")
        soak.add_arguments(one)
    options = parser.parse_args(arguments)
    if not options.list and options.soak is None:
        parser.error("name a soak; --list says which there are")
    return options


def main() -> None:
    """Run one soak; exit code 1 when it finds something."""
    options = parse()
    if options.list:
        for name, soak in SOAKS.items():
            print(f"{name:10} {soak.about}")
        return
    end_on_signals()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    print(f"soak {options.soak}: seed {seed}", flush=True)
    try:
        summary = SOAKS[options.soak].run(options, seed)
    except LabError as failure:
        sys.exit(f"soak failed: {failure}")
    except KeyboardInterrupt:
        sys.exit("interrupted; everything was cleaned up")
    print(f"soak {options.soak}, seed {seed}: {summary}")


if __name__ == "__main__":
    main()
