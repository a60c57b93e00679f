"""The text of a refusal without personal data: for the detail of an error, by which failures are grouped.

XONE may echo what was sent to it, and its own words can't be told from a customer's. So only words of a fixed
vocabulary stay; each run of other words and numbers becomes one ``…``:

    {"errors": [{"field": "policyholder.email", "message": "'ada@example.com' is not a valid email address."}]}
    policyholder.email: … is not a valid email address

XONE's page does not document the body of a refusal. The shapes that are read are those of its older API and of common
frameworks: texts under ``errors``, ``error``, ``detail``, ``message`` and the like, one by one or by field.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from models.booking import Booking, Coi, Person, QuoteRef
from models.booking import Policy as BookedPolicy
from models.job import BrightwriteDetails, Insured, Job, Policyholder, Quote

MAX_LENGTH = 200  # characters
MAX_BODY = 64 * 1024  # bytes; a longer one is no message to people
MAX_DEPTH = 12
MAX_TEXTS = 20
MAX_READ = 1200  # characters of one text
MAX_WORD = 48  # characters

OTHER = "…"
Path = tuple[str, ...]

_TEXT_KEYS = ("message", "msg", "detail", "error_description", "title", "description", "reason", "error", "code")
_LIST_KEYS = ("errors", "messages", "details", "non_field_errors", "violations", "invalid_params", "invalid-params")
_FIELD_KEYS = ("field", "loc", "pointer", "param", "parameter", "name", "path", "source")


def refusal_text(body: bytes) -> str:
    """The messages of an answer with the names of their fields; empty if there are none.

    Contains words of the vocabulary only, and at most 200 characters. body: of any answer, JSON or not.
    """
    if len(body) > MAX_BODY:
        return ""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    texts = islice(_texts(content, (), is_message=not isinstance(content, dict)), MAX_TEXTS)
    clauses = dict.fromkeys(_clause(path, text) for path, text in texts)
    return _shortened("; ".join(clause for clause in clauses if clause))


def _texts(node: Any, path: Path, is_message: bool) -> Iterator[tuple[Path, str]]:
    """Each message with the path of its subject. is_message: whether a bare text is a message and no echo."""
    if isinstance(node, str) and is_message:
        yield path, node
    if len(path) > MAX_DEPTH:
        return
    if isinstance(node, list):
        for item in node:
            yield from _texts(item, (*path, ""), is_message or isinstance(item, str))
    elif isinstance(node, dict):
        texts = [node[key] for key in _TEXT_KEYS if isinstance(node.get(key), str)]
        parts = [node[key] for key in (*_TEXT_KEYS, *_LIST_KEYS) if isinstance(node.get(key), dict | list)]
        if texts:
            with_known_words = (text for text in texts if _normalised(text).strip(OTHER))
            yield (*path, *_field_beside(node)), next(with_known_words, texts[0])
        for part in parts:
            yield from _texts(part, (*path, ""), is_message=True)
        if not texts and not parts:  # its keys are the fields
            for key, value in node.items():
                yield from _texts(value, (*path, key), is_message)


def _field_beside(node: dict[str, Any]) -> Path:
    """The field that is named beside a message: ``"a.b"``, ``["a", "b"]`` or ``{"pointer": "/a/b"}``."""
    named = next((node[key] for key in _FIELD_KEYS if node.get(key)), None)
    if isinstance(named, dict):
        named = next((named[key] for key in _FIELD_KEYS if named.get(key)), None)
    elif named is node.get("path") and str(named).startswith("/"):
        return ()  # the URL that was called
    steps = named if isinstance(named, list) else [named]
    return tuple(step for step in steps[:MAX_DEPTH] if isinstance(step, str))


def _clause(path: Path, text: str) -> str:
    """``policyholder.email: this field is required``; empty if no known word is left."""
    steps = [step for whole in path for step in re.split(r"[.\[\]/]+", whole[:MAX_READ]) if not _is_index(step)]
    place = ".".join(_runs_as_one(_known(step) or OTHER for step in steps)) if steps else ""
    words = _normalised(text)
    if not place.strip(OTHER):
        return words if words.strip(OTHER) else ""
    return f"{place}: {words}" if words else place


def _is_index(step: str) -> bool:
    return not step or step.isdigit()


def _normalised(text: str) -> str:
    """The known words of a text in small letters, with their punctuation, and each run of other words as ``…``.

    Only ``…`` if all known words are function words, which say nothing by themselves.
    """
    words = list(_runs_as_one(_word(chunk) for chunk in text[:MAX_READ].split()))
    if words and all(word.rstrip(",;:.") in _SAY_NOTHING_ALONE for word in words):
        return OTHER
    return " ".join(words).rstrip(",;:.")


def _word(chunk: str) -> str:
    core = chunk.strip(_AROUND)
    known = _known(core) if core else ""
    if not known:
        return OTHER if core else ""
    mark = chunk.rstrip(_CLOSING)[-1]
    return known + mark if mark in ",;:." else known


_CLOSING = "\"'`’”»)]}>"
_AROUND = _CLOSING + "‘“„«([{<.,;:!?…-–—/\\|*#=&+_"
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def _known(word: str) -> str | None:
    """The word in small letters if it, or each of its parts, is known: ``offerExpired``, ``offer_expired``."""
    if len(word) > MAX_WORD:
        return None
    small = word.replace("’", "'").lower().removesuffix("'s")
    if small in VOCABULARY:
        return small
    compound = _HUMPS.sub("_", word).lower()
    parts = re.split(r"[._/-]", compound)
    return compound if compound in VOCABULARY or (len(parts) > 1 and VOCABULARY.issuperset(parts)) else None


def _runs_as_one(words: Iterator[str]) -> Iterator[str]:
    """Drops empty words, and leaves one ``…`` of each run."""
    before = ""
    for word in words:
        if word and not (word == before == OTHER):
            yield word
            before = word


def _shortened(text: str) -> str:
    if len(text) <= MAX_LENGTH:
        return text
    return re.sub(r"[^ .]*$", "", text[: MAX_LENGTH - 1]).rstrip(" ,;:.…") + OTHER


_FIELDS = {
    name
    for model in (
        Job, Quote, BrightwriteDetails, Insured, Policyholder, Booking, BookedPolicy, Person, QuoteRef, Coi,
    )
    for name in model.model_fields
}  # fmt: skip

# Words that are likelier names than words of a refusal are left out: "will", "may", "grant", "mark" and such.
_FUNCTION_WORDS = """
    a about above after again all already also although always an and another any are as at be because been before
    being below between but by can could did do does each either else every for from had has have how however if
    in instead is it its most must neither no nor not now of on once only or other others out over own per same
    several should since so something than that the their them then there these they this those through to too
    under until up via was we were what when where whether which while who whole why with within without yet you
    your
"""
_WORDS = """
    accept accepted access action activated active actual address addresses allow allowed amount apartment api
    applicable application apply argument array attempt attribute attributes authentication authorisation
    authorised authorization authorized available back bad base beginning benefit beyond birth birthday blank
    blocked body booked booking bookings boolean both building call called can't cancel cancellation cancelled
    cannot card category certificate change changed changes channel character characters charge charged check
    checked choice choices choose city client closed code coi combination commission complete completed condition
    conditions confirm confirmation confirmed conflict conflicting connection contact contain contained contains
    content contract correct couldn't countries country county coupon cover coverage covered create created
    creation credentials credit currencies currency currently customer data database date dates datetime day days
    dead deadline decimal decline declined default deleted denied dependency described description destination
    detail details didn't different digit digits disabled discount document documents doesn't domain don't down
    due duplicate duplicated duration during e-mail e-mails early element elements eligibility eligible email
    emails empty enabled end ended ending ends enough ensure enter entity entries entry equal error errors event
    exact exactly exceed exceeded exceeds except exist existing exists expect expected expiration expire expired
    expires expiry external extra fail failed failure false family features fee fewer field fields file final
    finalised finalized find first fnol forbidden form format found full future gateway gender generic given
    greater handle hasn't header headers health here holder hour hours house id identical identification
    identifier identity ignored inactive include included including incomplete incorrect index info information
    input instance instant insurance insured insurer integer internal invalid isn't issue issued item items json
    key keys kind know known language large last late later least legal length less letter letters level license
    life limit limited line link links list live loaded locale located locked long longer lookup made mandatory
    many match matched matches matching max maximum medical message method middle min minimum minute minutes
    mismatch missing mobile mode model moment month months more name names national nationality negative never new
    next non none nothing null number numbers numeric object objects offer offer's offers old one open operation
    option optional options order orders outdated outside owner package paid parameter parameters parent parse
    part partial partner partners passed passenger passengers passport past path pattern pay payload payment
    payments pending percent period permanently permission permissions permitted person personal phone pick place
    plan please policies policy policyholder positive possible post postal postcode precision premium present
    previous previously price prices pricing problem process processed processing product products profile
    prohibited properly properties property protection provide provided provider purchase purchased quantity quota
    quote quotes range rate reached read reason received recipient record records reference refund refused region
    regions registered reject rejected related relation remove removed repeated replace replaced request requested
    requests require required requirement requirements requires reserved residence resident resource response
    restricted result retail retry return returned risk role rule rules schema scheme scope second seconds section
    security see select selected seller send sent separate server service session set short shouldn't sign
    signature single size soon specified start started starting starts state status still stopped street string
    submit submitted succeeded success such suffix sum supplied supply support supported suspended system take tax
    taxes telephone template temporarily temporary term terminated terms text time timeout times timestamp
    timezone title today token total travel traveler travelers traveller travellers trip true try twice two type
    types unable unauthorised unauthorized unavailable underwriter underwriting unexpected unique unit unknown
    unprocessable unrecognised unrecognized unsupported update updated upper url use used user username uses using
    uuid valid validate validated validation value values variant vehicle verification verified verify version
    violated violation voucher wasn't way words wrong year years zero zip zone
"""
_CODES = """
    access_denied invalid_client invalid_grant invalid_request invalid_scope unauthorized_client unsupported_grant_type
"""  # of OAuth 2, RFC 6749 section 5.2

_SAY_NOTHING_ALONE = frozenset({*_FUNCTION_WORDS.split(), OTHER})
VOCABULARY = frozenset({*_FUNCTION_WORDS.split(), *_WORDS.split(), *_CODES.split(), *_FIELDS, "bw", "ins"})
