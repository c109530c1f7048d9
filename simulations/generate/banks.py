"""Banks: what an applicant states decides the loan, what a customer complains of decides department and remedy."""

from __future__ import annotations

from simulations.generate.domain import Case, Domain, Outcome, Text, parse_cues

_DECIDED = (("decision", 0.75), ("question", 0.25))
_COMPLAINED = (("complaint", 1.0),)
# A complaint comes up half as often as an application of the same product.
_COMPLAINT_SHARE = 0.4

_SHORT_CONTRACTS = "works on short contracts/hired by the month"
_LATE_BILLS = "phone bills paid late/late with the phone bill"
_OWN_HOUSE = "owns a house free of debt/house fully paid"
_NEW_JOB = "started the job in spring/on probation at work"


def _decision(product: str, verdict: str, reason: str, *facts: str) -> Outcome:
    return Outcome(product, f"{verdict}: {reason}", verdict, reason, parse_cues(*facts), _DECIDED)


def _complaint(product: str, department: str, remedy: str, *signs: str) -> Outcome:
    name = f"{department}; {remedy}"
    return Outcome(product, name, department, remedy, parse_cues(*signs), _COMPLAINED, _COMPLAINT_SHARE)


OUTCOMES = (
    _decision(
        "mortgage",
        "approved",
        "fixed rate for ten years",
        "saved a third of the price/large deposit put aside",
        "two salaries in the family/both partners earn",
        "same employer for twelve years/long service with one firm",
        "valuation above the price/surveyor values it higher",
        _OWN_HOUSE,
    ),
    _decision(
        "mortgage",
        "declined",
        "deposit too small",
        "five percent saved/little saved up",
        "deposit borrowed from a friend/friend lends the deposit",
        "wants the fees added/asks to borrow the fees",
        "no gift from the parents/parents cannot help",
        "savings spent on a wedding/wedding used up the savings",
    ),
    _decision(
        "mortgage",
        "declined",
        "income not secure",
        _SHORT_CONTRACTS,
        "bonus makes up half the pay/half of the pay is bonus",
        "firm has announced cuts/employer is laying off",
        "no pay slips for june/missing pay slips",
        "wife on unpaid leave/partner without pay",
    ),
    _decision(
        "car loan",
        "approved",
        "term of four years",
        "trades in the old car/old car taken in part payment",
        "drives to a steady job/commutes to a permanent post",
        "quarter of the price in cash/pays a quarter at once",
        "earlier car loan repaid/last car loan closed",
        "garage is a partner/bought from a partner garage",
    ),
    _decision(
        "car loan",
        "declined",
        "car too old",
        "first registered fifteen years ago/car from the last century",
        "odometer past two hundred thousand/very high mileage",
        "rust on the frame/rusty frame",
        "no inspection sticker/inspection has lapsed",
        "spare parts hard to find/maker has gone out of business",
    ),
    _decision(
        "car loan",
        "declined",
        "two cars already financed",
        "leases a van as well/van on lease",
        "another instalment plan running/pays off another vehicle",
        "motorbike bought on credit/bike on credit",
        "spouse has a car credit/car credit in the spouse's name",
        _LATE_BILLS,
    ),
    _decision(
        "business loan",
        "approved",
        "half secured by stock",
        "warehouse full of goods/goods in the warehouse",
        "audited books/books checked by an auditor",
        "orders for two years/order book is full",
        "profit each year since founding/never made a loss",
        "exports to five countries/sells abroad",
    ),
    _decision(
        "business loan",
        "declined",
        "one customer only",
        "sells everything to one chain/single buyer",
        "contract with the chain ends soon/main contract runs out",
        "no sales staff/nobody does the selling",
        "prices set by the buyer/buyer dictates prices",
        "shares a hall with the buyer/sits in the buyer's hall",
    ),
    _decision(
        "business loan",
        "declined",
        "plan not convincing",
        "sales guessed/no market study",
        "founder never ran a shop/no trade experience",
        "three rivals in the same street/crowded street",
        "costs left out/cost table missing",
        _NEW_JOB,
    ),
    _decision(
        "student loan",
        "approved",
        "repay after the degree",
        "admitted to medicine/place in medical school",
        "top marks at school/best of the class",
        "scholarship covers the rent/rent paid by a grant",
        "uncle stands as guarantor/guarantee from an uncle",
        "tutors at weekends/earns by tutoring",
    ),
    _decision(
        "student loan",
        "declined",
        "course not recognised",
        "school has no licence/unlicensed academy",
        "lessons by post only/correspondence course",
        "diploma after six weeks/six week diploma",
        "fees due in advance/must pay all fees first",
        "no list of lecturers/lecturers not named",
    ),
    _decision(
        "student loan",
        "declined",
        "studies take too long",
        "changed subject three times/third change of subject",
        "in the tenth year/ten years enrolled",
        "no exams last term/skipped all exams",
        "works full time in a bar/full time barman",
        "thesis not begun/no thesis topic",
    ),
    _decision(
        "credit card",
        "approved",
        "limit of two salaries",
        "salary paid into our account/wages arrive here",
        "never overdrawn/account always in credit",
        "pays cards in full/clears every card bill",
        "customer since childhood/youth account with us",
        "travels for work/business trips every month",
    ),
    _decision(
        "credit card",
        "declined",
        "entry in the register",
        "debt collector wrote/letter from a collector",
        "court order for payment/payment order by a court",
        "cheque returned/bounced cheque",
        "insolvent four years ago/past insolvency",
        _LATE_BILLS,
    ),
    _decision(
        "credit card",
        "declined",
        "identity not proven",
        "passport expired/passport out of date",
        "address not confirmed/letter came back unopened",
        "photo does not match/picture looks different",
        "signature differs/two different signatures",
        "refused the video call/hung up on the video check",
    ),
    _decision(
        "renovation loan",
        "approved",
        "subsidy added",
        "heat pump planned/replaces the boiler by a heat pump",
        "roof gets solar panels/solar roof",
        "energy adviser signed/report of an energy adviser",
        "thick wall insulation/walls to be insulated",
        _OWN_HOUSE,
    ),
    _decision(
        "renovation loan",
        "declined",
        "no building permit",
        "extra floor on top/adds a storey",
        "protected old building/listed building",
        "neighbour objects/objection from next door",
        "drawings without a stamp/architect has not signed",
        "garage becomes a flat/turns the garage into rooms",
    ),
    _decision(
        "renovation loan",
        "declined",
        "not the owner",
        "rents the flat/tenant of the flat",
        "name missing in the land register/land register names someone else",
        "house belongs to an aunt/aunt owns the house",
        "inheritance in dispute/heirs are quarrelling",
        _SHORT_CONTRACTS,
    ),
    _complaint(
        "mortgage",
        "rates desk",
        "correct the interest",
        "interest above the offer/rate higher than promised",
        "fixed period ignored/fixed term not kept",
        "charged for an early payment/fee on paying early",
        "statement shows two rates/two rates in one month",
    ),
    _complaint(
        "mortgage",
        "land office",
        "release the deed",
        "deed not returned/still waiting for the deed",
        "last instalment paid in may/fully repaid in may",
        "notary asks for papers/notary keeps calling",
        "sale of the house blocked/buyer is waiting",
    ),
    _complaint(
        "car loan",
        "vehicle desk",
        "send the papers",
        "registration papers missing/no registration papers",
        "cannot sell the car/sale of the car stuck",
        "wrong plate number/plate misspelt",
        "papers sent to the dealer/dealer has the papers",
    ),
    _complaint(
        "car loan",
        "insurance desk",
        "cancel the cover",
        "insurance never asked for/cover added unasked",
        "premium taken twice/double premium",
        "own insurer already/insured elsewhere",
        "cover goes on after the loan/still insured after the end",
    ),
    _complaint(
        "business loan",
        "payments team",
        "refund the wire fee",
        "transfer abroad cost double/expensive foreign transfer",
        "supplier got less/supplier received too little",
        "fee not announced/hidden fee",
        "swift copy missing/no proof of the transfer",
    ),
    _complaint(
        "business loan",
        "branch manager",
        "arrange a meeting",
        "adviser changed again/fourth adviser this year",
        "nobody calls back/calls not returned",
        "credit line cut without notice/line reduced overnight",
        "kept waiting an hour/long wait at the counter",
    ),
    _complaint(
        "student loan",
        "education desk",
        "pause the payments",
        "still enrolled but billed/billed while studying",
        "ill for a term/term lost to illness",
        "year abroad approved/exchange year",
        "baby born in autumn/on parental leave",
    ),
    _complaint(
        "student loan",
        "payout team",
        "pay out today",
        "tuition not transferred/tuition never arrived",
        "landlord threatens/rent is overdue",
        "third month without money/no payout for months",
        "university sent a reminder/reminder from the university",
    ),
    _complaint(
        "credit card",
        "fraud team",
        "block the card",
        "purchases from another country/strange foreign charges",
        "card never left the drawer/card was at home",
        "message with a link/clicked a link",
        "cash drawn at night/night withdrawals",
    ),
    _complaint(
        "credit card",
        "card service",
        "print a new card",
        "chip does not work/chip unreadable",
        "name spelt wrong/misspelt name",
        "card swallowed by the machine/machine kept the card",
        "broken in the middle/cracked card",
    ),
    _complaint(
        "renovation loan",
        "subsidy office",
        "file it again",
        "grant refused for a date/grant lost over a date",
        "form lost by the bank/bank mislaid the form",
        "ministry never heard of it/ministry knows nothing",
        "window subsidy missing/no money for the windows",
    ),
    _complaint(
        "renovation loan",
        "builder desk",
        "release the next part",
        "builder not paid/craftsmen stopped work",
        "second part held back/money withheld",
        "inspector has signed/inspection passed",
        "scaffold costs every day/paying for the scaffold",
    ),
)

TOPICS = tuple(dict.fromkeys(outcome.topic for outcome in OUTCOMES))

REMARKS = (
    "likes hiking",
    "plays the violin",
    "has two cats",
    "lives near the station",
    "came on a monday",
    "speaks three languages",
    "born in the north",
    "sings in a choir",
    "heard of us on the radio",
    "brought a folder",
    "has a garden plot",
    "twin sister",
    "member of the fire brigade",
    "prefers letters",
    "prefers email",
    "called twice",
    "wears a hat",
    "friendly on the phone",
    "moved here last year",
    "coaches a football team",
    "has a sailing boat on a lake",
    "bakes bread",
    "no children",
    "three children",
    "reads the news",
    "collects stamps",
    "short of time",
    "speaks softly",
    "rides a bicycle",
    "lives with grandparents",
)

_STYLES = 4


def _who(case: Case, style: int) -> str:
    age, woman = case.person.age, case.person.woman
    return (
        f"{'Ms' if woman else 'Mr'} A, age {age}",
        f"{age}, {'female' if woman else 'male'}",
        f"a {'woman' if woman else 'man'} of {age}",
        f"{'W' if woman else 'M'}{age}",
    )[style]


def _decision_prompt(product: str, who: str, stated: tuple[str, ...], style: int, variant: float) -> str:
    first = variant < 0.5
    return (
        f"Application for a {product}. {who}. Facts: {'; '.join(stated)}. Decision:"
        if first
        else f"{who} applies for a {product}: {', '.join(stated)}. Decision:",
        f"LOAN FILE {product} | {who} | {' | '.join(stated)} | RESULT"
        if first
        else f"{product.upper()} - {who} - {' - '.join(stated)} - RESULT",
        f"At the counter: {who} asks for a {product}. {'. '.join(stated)}. What do we answer?"
        if first
        else f"We talked with {who} about a {product}: {', '.join(stated)}. What do we answer?",
        f"{product} req {who}: {', '.join(stated)} =>" if first else f"req/{product}/{who}/{'/'.join(stated)} =>",
    )[style]


def _complaint_prompt(product: str, who: str, stated: tuple[str, ...], style: int, variant: float) -> str:
    first = variant < 0.5
    return (
        f"Complaint about a {product}. {who} writes: {'; '.join(stated)}. Handling:"
        if first
        else f"Letter from {who} ({product}): {', '.join(stated)}. Handling:",
        f"COMPLAINT {product} | {who} | {' | '.join(stated)} | ROUTE",
        f"Unhappy customer, {who}, {product}. {'. '.join(stated)}. Who helps?"
        if first
        else f"Today {who} was angry about the {product}: {', '.join(stated)}. Who helps?",
        f"cmpl {product} {who}: {', '.join(stated)} ->",
    )[style]


def _handling(complaint: Outcome, style: int) -> str:
    return (
        f"To the {complaint.code}: {complaint.action}.",
        f"{complaint.code} | {complaint.action}",
        f"The {complaint.code} will {complaint.action}.",
        f"{complaint.code}, {complaint.action}",
    )[style]


def _question(product: str, who: str, stated: tuple[str, ...], style: int) -> str:
    listed = ", ".join(stated)
    return (
        f"Question: {who} wants a {product} and says: {listed}. What matters most?",
        f"Q {product}, {who}, {listed}: MAIN POINT?",
        f"What settles the {product} for {who}, given {listed}?",
        f"q {product} {who} {listed}, key point",
    )[style]


def _point(decision: Outcome, style: int) -> str:
    good = decision.code == "approved"
    return (
        f"We can grant it, {decision.action}." if good else f"We must refuse, {decision.action}.",
        f"{'OK' if good else 'NO'} - {decision.action}",
        f"Yes, {decision.action}." if good else f"No, {decision.action}.",
        f"{'yes' if good else 'no'}, {decision.action}",
    )[style]


def render(case: Case, style: int, variant: float) -> Text:
    """The record's text in the house style; see `domain.Domain.render`."""
    who, outcome = _who(case, style), case.outcome
    if case.kind == "decision":
        return Text(_decision_prompt(outcome.topic, who, case.stated, style, variant), outcome.name)
    if case.kind == "complaint":
        return Text(_complaint_prompt(outcome.topic, who, case.stated, style, variant), _handling(outcome, style))
    return Text(_question(outcome.topic, who, case.stated, style), _point(outcome, style))


BANKS = Domain("banks", TOPICS, OUTCOMES, REMARKS, _STYLES, render, exact="decision")
