"""The cluster test: three nodes of RabbitMQ, a replicated PostgreSQL and workers, of which one after another fails.

    python -m tests.cluster --fault "worker killed" --fault "XONE down"
    python -m tests.cluster --soak 30 --seed 1

A checkout publishes jobs steadily and keeps each until the broker has confirmed it. A consumer acknowledges each event
that it has received. After each fault all jobs must end, and a checker decides from what was seen whether the promises
of docs/reliability.md were kept. By default all faults come one by one, and then, for three minutes, at random. If a
promise is broken, the exit code is 1 and the logs are kept.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click

from tests.cluster.bench import Bench
from tests.cluster.checker import Verdict
from tests.cluster.faults import FAULTS
from tests.cluster.trials import COLUMNS, row, soak, told, try_fault

ONLY = f"Only this one, and no soak. One of: {', '.join(f'“{name}”' for name in FAULTS)}."


@click.command(help=__doc__)
@click.option("--fault", "names", multiple=True, type=click.Choice(list(FAULTS)), metavar="NAME", help=ONLY)
@click.option(
    "--soak", "minutes", type=click.FloatRange(0), help="Minutes of random faults; without --fault only that."
)
@click.option("--seed", type=int, help="Repeats the faults of an earlier soak; else one at random.")
@click.option("--shuffle", is_flag=True, help="The single faults in random order, by the seed.")
@click.option("--rate", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Jobs a second.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--keep", is_flag=True, help="Keep the logs in any case.")
def main(
    names: tuple[str, ...],
    minutes: float | None,
    seed: int | None,
    shuffle: bool,
    rate: float,
    workers: int,
    keep: bool,
) -> None:
    seed = random.randrange(1_000_000) if seed is None else seed
    singles = list(names) if names or minutes is not None else list(FAULTS)
    if shuffle:
        random.Random(seed).shuffle(singles)
    minutes = (0 if names else 3) if minutes is None else minutes
    folder = Path(tempfile.mkdtemp(prefix="confirm-offer-cluster-"))
    click.echo(f"seed {seed}, logs in {folder}")
    verdicts: list[Verdict] = []

    def tell(name: str, verdict: Verdict) -> None:
        verdicts.append(verdict)
        click.echo("\n".join([row(name, verdict), *told(verdict)]))

    with Bench(folder, workers) as bench:
        click.echo(COLUMNS)
        for name in singles:
            for title, verdict in try_fault(bench, name, rate).items():
                tell(title, verdict)
        if minutes:
            tell(f"soak of {minutes:g} min", soak(bench, minutes, seed, rate, click.echo))
    broken = Counter(rule for verdict in verdicts for rule in verdict.violations)
    click.echo(
        "calls: repeated after one that may have booked; longest pause: without an event while jobs waited;"
        " all flows after: from the begin of the fault until no job takes longer than 5 s"
    )
    for rule, count in broken.items():
        click.echo(f"broken {count} times: {rule}")
    if broken:
        click.echo(f"repeat with --seed {seed}; logs in {folder}")
        sys.exit(1)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
