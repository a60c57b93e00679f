"""Faults under load, and what the checker finds: one fault, or a soak of random ones."""

import random
import time
from collections.abc import Callable
from dataclasses import replace

from tests.cluster.bench import SETTLE, Bench
from tests.cluster.checker import Verdict, check
from tests.cluster.clients import Checkout
from tests.cluster.faults import AFTERWARDS, FAULTS, strike

AFTER_FAULT = 5.0  # seconds for which jobs are published on
SOAK_EVERY, SOAK_LONGEST = 10.0, 8.0  # seconds from fault to fault, and that a fault lasts, in a soak
SHOWN = 5  # violations of each rule
HEADINGS = ("lasts", "jobs", "lost", "doubled", "repeated events", "calls", "longest pause", "all flows after")
COLUMNS = (
    f"| {'fault':36} | " + " | ".join(HEADINGS) + " |\n"
    f"|{'-' * 38}|" + "|".join("-" * (len(heading) + 1) + ":" for heading in HEADINGS) + "|"
)


def try_fault(bench: Bench, name: str, rate: float, seconds: float | None = None) -> dict[str, Verdict]:
    """Lets a fault happen under load, and decides. Where rows may be lost, once more after `reconcile`.

    seconds: how long it lasts, if not as usual.
    """
    fault = FAULTS[name]
    with bench.load(rate) as checkout:
        span = strike(bench, fault, fault.seconds if seconds is None else seconds)
        time.sleep(AFTER_FAULT)
    within = fault.within or span[1] - span[0] + AFTERWARDS
    bounds = {"within": within, "max_pause": fault.max_pause}
    verdicts = {name: judge(bench, checkout, fault=span, is_lossy=fault.is_lossy, **bounds)}
    if fault.is_lossy:
        bench.reconcile()
        verdicts["… and reconciled"] = judge(bench, checkout, fault=span, is_lossy=True, is_reconciled=True)
    return verdicts


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
    """A row of a table in Markdown, under COLUMNS."""
    counts = (verdict.jobs, verdict.lost, verdict.doubled, verdict.repeated_events, verdict.repeated_calls)
    cells = (f"{verdict.lasted:.0f} s", *counts, f"{verdict.stall:.1f} s", f"{verdict.flows_after:.1f} s")
    return f"| {name:36} | " + " | ".join(f"{c:>{len(h)}}" for c, h in zip(cells, HEADINGS, strict=True)) + " |"


def told(verdict: Verdict) -> list[str]:
    """The violations, in lines."""
    lines = []
    for rule, violations in verdict.violations.items():
        lines.append(f"    WRONG  {rule}: {len(violations)} not")
        lines += [f"             {violation[:500]}" for violation in violations[:SHOWN]]
    return lines
