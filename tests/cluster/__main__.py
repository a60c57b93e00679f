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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from tests.cluster.bench import SETTLE, Bench
from tests.cluster.checker import Verdict, check
from tests.cluster.clients import Checkout
from tests.cluster.faults import AFTERWARDS, FAULTS, strike

AFTER_FAULT = 5.0  # seconds for which jobs are published on
SOAK_EVERY, SOAK_LONGEST = 10.0, 8.0  # seconds from fault to fault, and that a fault lasts, in a soak
SHOWN = 5  # violations of each rule
COLUMNS = f"{'':36} {'jobs':>5} {'lost':>5} {'doubled':>8} {'repeated':>9} {'longest pause':>14} {'flows after':>12}"


def try_fault(bench: Bench, name: str, rate: float, seconds: float | None = None) -> Verdict:
    """Lets a fault happen under load, and decides. seconds: how long it lasts, if not as usual."""
    fault = FAULTS[name]
    with bench.load(rate) as checkout:
        span = strike(bench, fault, fault.seconds if seconds is None else seconds)
        time.sleep(AFTER_FAULT)
    within = fault.within or span[1] - span[0] + AFTERWARDS
    return judge(bench, checkout, fault=span, is_lossy=fault.is_lossy, within=within)


def soak(bench: Bench, minutes: float, seed: int, rate: float, say: Callable[[str], None]) -> Verdict:
    """Lets random faults happen, one after another, and decides at the end."""
    dice = random.Random(seed)
    names = [name for name, fault in FAULTS.items() if fault.in_soak]
    with bench.load(rate) as checkout:
        began = time.monotonic()
        while time.monotonic() < began + minutes * 60:
            name, lasts = dice.choice(names), dice.uniform(1, SOAK_LONGEST)
            say(f"  {time.monotonic() - began:6.1f} s  {name}, for {lasts:.1f} s")
            fault_began, _ = strike(bench, FAULTS[name], lasts)
            time.sleep(max(0.0, fault_began + SOAK_EVERY - time.monotonic()))
    return judge(bench, checkout, fault=(began, time.monotonic()))


def judge(bench: Bench, checkout: Checkout, **circumstances: object) -> Verdict:
    """Waits until all has ended, and lets the checker decide. circumstances: attributes of Histories."""
    unsettled = () if bench.settle(checkout) else (f"not all had ended {SETTLE:.0f} s after the fault",)
    seen = replace(bench.histories(checkout), **circumstances)  # type: ignore[arg-type]
    incidents = (*unsettled, *bench.incidents())
    return check(replace(seen, dead_letters=bench.dead_letters(), incidents=incidents))


def row(name: str, verdict: Verdict) -> str:
    repeated = f"{verdict.repeated_events} / {verdict.repeated_calls}"
    return (
        f"{name:36} {verdict.jobs:5} {verdict.lost:5} {verdict.doubled:8} {repeated:>9}"
        f" {verdict.stall:12.1f} s {verdict.flows_after:10.1f} s"
    )


def told(verdict: Verdict) -> list[str]:
    """The violations, in lines."""
    lines = []
    for rule, violations in verdict.violations.items():
        lines.append(f"    WRONG  {rule}: {len(violations)} not")
        lines += [f"             {violation[:500]}" for violation in violations[:SHOWN]]
    return lines


@click.command(help=__doc__)
@click.option("--fault", "names", multiple=True, type=click.Choice(list(FAULTS)), help="Only this one; no soak.")
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
            tell(name, try_fault(bench, name, rate))
        if minutes:
            tell(f"soak of {minutes:g} min", soak(bench, minutes, seed, rate, click.echo))
    broken = Counter(rule for verdict in verdicts for rule in verdict.violations)
    click.echo("repeated: events / calls; flows after: from the begin of the fault until no job takes longer than 5 s")
    for rule, count in broken.items():
        click.echo(f"broken {count} times: {rule}")
    if broken:
        click.echo(f"repeat with --seed {seed}; logs in {folder}")
        sys.exit(1)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
