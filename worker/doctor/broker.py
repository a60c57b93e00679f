"""Checks the broker: connection, declarations and permissions, publishing, queues that grow."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

from worker.doctor.finding import Finding, Level, safe_part
from worker.formatting import pluralize
from worker.messaging import broker, topology
from worker.messaging.inspection import (
    Comparison,
    ConnectionProblem,
    Declaration,
    Inspection,
    Publishing,
    QueueDepth,
    connection_problem,
)
from worker.settings import BrokerSettings

CHECK, RIGHTS, QUEUES = "broker", "broker rights", "queues"
MIN_VERSION = (3, 10)
GRANT_REMEDY = "docs/rabbitmq-permissions.md has the command for the worker's user"


def check(settings: BrokerSettings) -> Iterator[Finding]:
    if settings.url.startswith("memory"):
        yield Finding.warning(CHECK, "in-memory: jobs reach this process only", "set BROKER_URL to that of a RabbitMQ")
        return
    urls = settings.url.split(";")
    with ThreadPoolExecutor(len(urls)) as pool:
        hosts = dict(zip(urls, pool.map(_host, urls), strict=True))
    reached = [url for url, (is_reached, _) in hosts.items() if is_reached]
    for is_reached, finding in hosts.values():
        yield finding if is_reached or not reached else finding._replace(level=Level.WARNING)
    if reached:
        yield from _examine(reached[0], all_up=len(reached) == len(urls))


def _host(url: str) -> tuple[bool, Finding]:
    """Whether a host is reached, and what it is, or why not."""
    try:
        with Inspection(url) as inspection:
            return True, _server(inspection, url)
    except Exception as error:
        return False, connection_finding(error, url)


def _examine(url: str, all_up: bool) -> Iterator[Finding]:
    try:
        with Inspection(url) as inspection:
            comparisons = list(inspection.compare_declarations())
            yield from _declarations(comparisons)
            for exchange, outcome in inspection.try_publishing():
                yield from _publishing(exchange, outcome)
                if exchange == topology.confirm_offer.name and outcome is Publishing.ACCEPTED:
                    yield _message_size(inspection)
            yield from _depths({each.name: each.depth for each in comparisons if each.depth is not None}, all_up)
    except Exception as error:
        yield connection_finding(error, url)


def _place(url: str) -> str:
    address = urlsplit(url)
    port = address.port or (5671 if address.scheme == "amqps" else 5672)
    return f"{safe_part(address.hostname or 'localhost')}:{port}, virtual host {safe_part(_virtual_host(address.path))}"


def _virtual_host(path: str) -> str:
    return unquote(path[1:]) or "/"


def _server(inspection: Inspection, url: str) -> Finding:
    product, version = inspection.product, inspection.version
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if product == "RabbitMQ" and numbers < MIN_VERSION:
        return Finding.error(CHECK, f"RabbitMQ {version} at {_place(url)}", "RabbitMQ 3.10 or later is needed")
    return Finding.ok(CHECK, f"{safe_part(product)} {safe_part(version)} at {_place(url)}")


def connection_finding(error: Exception, url: str) -> Finding:
    """What connecting to the broker, or a later operation, raised. url: BROKER_URL, or one of its hosts."""
    urls = url.split(";")
    place, name = "; ".join(map(_place, urls)), safe_part(_virtual_host(urlsplit(urls[-1]).path))
    match connection_problem(error):
        case ConnectionProblem.LOGIN_REFUSED:
            return Finding.error(
                CHECK, f"{place}: user or password is not accepted", "check user and password in BROKER_URL"
            )
        case ConnectionProblem.RIGHT_LACKING:
            return Finding.error(RIGHTS, f"{place}: {broker.refuses(error)}", GRANT_REMEDY)
        case ConnectionProblem.NO_VIRTUAL_HOST:
            return Finding.error(
                CHECK,
                f"{place}: there is no such virtual host",
                f"check the end of BROKER_URL, or make it: rabbitmqctl add_vhost {name}",
            )
        case ConnectionProblem.VIRTUAL_HOST_FORBIDDEN:
            return Finding.error(RIGHTS, f"{place}: the user may not use it", GRANT_REMEDY)
        case ConnectionProblem.CERTIFICATE_REFUSED:
            return Finding.error(
                CHECK,
                f"{place}: its certificate is refused ({broker.distrusts(error)})",
                "check the host and ssl_ca_certs in BROKER_URL: docs/tls.md",
            )
        case ConnectionProblem.NO_TLS:
            return Finding.error(
                CHECK, f"{place}: does not speak TLS", "check the port in BROKER_URL: amqps: is 5671 mostly"
            )
        case ConnectionProblem.UNKNOWN_HOST:
            return Finding.error(
                CHECK, f"{place}: no machine has this name", "check the host in BROKER_URL, and the name servers"
            )
        case ConnectionProblem.UNREACHABLE:
            return Finding.error(
                CHECK,
                f"{place}: can't be reached ({type(error).__name__})",
                "see whether RabbitMQ runs (rabbitmq-diagnostics check_running); check host and port in BROKER_URL",
            )


def _declarations(comparisons: list[Comparison]) -> Iterator[Finding]:
    missing = [each.name for each in comparisons if each.declaration is Declaration.MISSING]
    different = [each for each in comparisons if each.declaration is Declaration.DIFFERENT]
    forbidden = [each.name for each in comparisons if each.declaration is Declaration.FORBIDDEN]
    if missing:
        remedy = "confirm-offer broker declare (each worker does it too)"
        yield Finding.error(QUEUES, f"missing: {', '.join(missing)}", remedy)
    for each in different:
        remedy = "let it run empty, delete it, then: confirm-offer broker declare"
        yield Finding.error(QUEUES, f"{each.name}: {each.difference}", remedy)
    if forbidden:
        yield Finding.error(RIGHTS, f"the user may not declare: {', '.join(forbidden)}", GRANT_REMEDY)
    if not (missing or different or forbidden):
        queues, exchanges = len(topology.QUEUES), len(topology.EXCHANGES)
        yield Finding.ok(QUEUES, f"{queues} queues and {exchanges} exchanges are as they should be")


def _publishing(exchange: str, outcome: Publishing) -> Iterator[Finding]:
    """A missing exchange has its finding already."""
    if outcome is Publishing.BLOCKED:
        yield Finding.error(
            CHECK,
            "it takes no messages: an alarm of memory or disk space",
            "rabbitmq-diagnostics check_local_alarms; free disk space or memory there, or stop what fills it",
        )
    elif outcome is Publishing.FORBIDDEN:
        yield Finding.error(RIGHTS, f"the user may not publish to {exchange}", GRANT_REMEDY)


def _message_size(inspection: Inspection) -> Finding:
    limit = f"{topology.MAX_MESSAGE_SIZE // 1024**2} MiB"
    if inspection.takes_larger_messages():
        message = f"messages of more than {limit} are taken: they cost workers and RabbitMQ memory"
        remedy = f"max_message_size = {topology.MAX_MESSAGE_SIZE} in rabbitmq.conf"
        return Finding.warning("message size", message, remedy)
    return Finding.ok("message size", f"messages of more than {limit} are refused")


def _depths(depths: dict[str, QueueDepth], all_up: bool) -> Iterator[Finding]:
    """Queues without a consumer, and messages that a person has to deal with. all_up: whether all hosts were reached.

    A quorum queue counts the consumers of a node that has died until that comes back.
    """
    work = [depth for name, depth in depths.items() if name in (topology.JOBS, topology.RESUME)]
    waiting = sum(depth.messages for depth in work)
    if any(not depth.consumers for depth in work):
        yield Finding(
            "jobs",
            Level.ERROR if waiting else Level.WARNING,
            f"nobody takes them, and {waiting:,} wait",
            "confirm-offer worker (WORKER_PARTS must hold tasks)",
        )
    elif topology.JOBS in depths:
        workers = depths[topology.JOBS].consumers
        take = pluralize(workers, "worker takes", "workers take")
        counted = f"{take} them" if all_up else f"at most {take} them, with those that a lost node still counts"
        yield Finding.ok("jobs", f"{counted}, {waiting:,} wait")
    if topology.DEAD_LETTERS in depths and (letters := depths[topology.DEAD_LETTERS].messages):
        message = f"{pluralize(letters, 'job')} could not be accepted"
        yield Finding.warning("dead letters", message, "confirm-offer dead-letters list")
    unrouted = topology.unrouted_queue.name
    if unrouted in depths and (events := depths[unrouted].messages):
        yield Finding.warning(
            "events", f"{events:,} had no queue to go to: see {unrouted}", "docs/runbook.md, 'Nobody got the events'"
        )
