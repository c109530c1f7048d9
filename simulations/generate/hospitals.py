"""Hospitals: findings imply a diagnosis, with its code and next step; every hospital writes in a style of its own."""

from __future__ import annotations

from simulations.generate.domain import Case, Domain, Outcome, Text, parse_cues

_KINDS = (("coding", 0.55), ("note", 0.25), ("question", 0.2))

_FEVER = "fever/raised temperature"
_FATIGUE = "constant tiredness/ongoing fatigue"
_WEIGHT_LOSS = "weight loss/falling weight"
_BREATHLESS = "breathless on stairs/short of breath on climbing"


def _diagnosis(topic: str, name: str, code: str, action: str, *findings: str) -> Outcome:
    return Outcome(topic, name, code, action, parse_cues(*findings), _KINDS)


DIAGNOSES = (
    _diagnosis(
        "cardiology",
        "heart failure",
        "I50",
        "an echocardiogram",
        "swollen ankles/ankle oedema",
        "needs three pillows at night/cannot lie flat",
        "raised neck veins/full jugular veins",
        "sudden weight gain/two kilos more in a week",
        _BREATHLESS,
    ),
    _diagnosis(
        "cardiology",
        "stable angina",
        "I20",
        "a stress test",
        "chest tightness on walking/chest pressure on effort",
        "pain gone after rest/relief on sitting down",
        "pain down the left arm/left arm ache",
        "normal troponin/troponin not raised",
        "relief from nitrate spray/spray helps",
    ),
    _diagnosis(
        "cardiology",
        "atrial fibrillation",
        "I48",
        "a blood thinner",
        "irregular pulse/uneven heartbeat",
        "palpitations/racing heart",
        "absent p waves/no p waves on the tracing",
        "light headed spells/near fainting",
        "skipped beats/missed beats",
    ),
    _diagnosis(
        "cardiology",
        "pericarditis",
        "I30",
        "colchicine",
        "pain better leaning forward/eased by bending forward",
        "friction rub/scratching heart sound",
        "raised st segments/st elevation everywhere",
        "pain worse lying down/sharper when supine",
        "recent cold/virus last week",
    ),
    _diagnosis(
        "pulmonology",
        "asthma",
        "J45",
        "a steroid inhaler",
        "wheeze at night/nightly whistling breath",
        "cough after exercise/coughing after sport",
        "cat allergy/allergic to cats",
        "eczema as a child/childhood eczema",
        "chest tight in cold air/cold air brings tightness",
    ),
    _diagnosis(
        "pulmonology",
        "pneumonia",
        "J18",
        "amoxicillin",
        "rusty sputum/rust coloured phlegm",
        "shaking chills/rigors",
        "crackles on one side/crackling at the right base",
        "dull percussion/dull chest note",
        _FEVER,
    ),
    _diagnosis(
        "pulmonology",
        "lung embolism",
        "I26",
        "a chest scan",
        "long flight last week/recent long journey",
        "one swollen calf/tender calf",
        "stabbing pain on breathing in/pleuritic pain",
        "raised d dimer/positive d dimer",
        "coughing up blood/blood in the sputum",
    ),
    _diagnosis(
        "pulmonology",
        "chronic bronchitis",
        "J44",
        "lung rehabilitation",
        "barrel chest/widened chest",
        "phlegm every morning/productive morning cough",
        "pursed lips/puckers the mouth to exhale",
        "forty pack years/smoked for decades",
        _BREATHLESS,
    ),
    _diagnosis(
        "neurology",
        "migraine",
        "G43",
        "a triptan",
        "throbbing on one side/pulsating half of the head",
        "zigzag lines/flickering vision",
        "light hurts/hides in a dark room",
        "attacks after red wine/red wine brings it on",
        "mother has the same headaches/family headaches",
    ),
    _diagnosis(
        "neurology",
        "meningitis",
        "G03",
        "a lumbar puncture",
        "stiff neck/cannot bend the neck",
        "rash that does not fade/purple spots",
        "drowsy and confused/clouded mind",
        "severe sudden headache/worst headache ever",
        _FEVER,
    ),
    _diagnosis(
        "neurology",
        "parkinson disease",
        "G20",
        "levodopa",
        "tremor at rest/shaking hand at rest",
        "shuffling walk/small steps",
        "small handwriting/cramped writing",
        "lost sense of smell/cannot smell coffee",
        "rigid arms/cogwheel arms",
    ),
    _diagnosis(
        "neurology",
        "epilepsy",
        "G40",
        "a brain wave test",
        "bitten tongue/tongue bite",
        "jerking limbs/shaking of all limbs",
        "blank stare/unresponsive stare",
        "strange smell before the spell/odd aura",
        "slept long afterwards/sleepy after the attack",
    ),
    _diagnosis(
        "gastroenterology",
        "gallstones",
        "K80",
        "an ultrasound",
        "pain after fatty food/cramps after fried meals",
        "pain under the right ribs/right upper belly pain",
        "pain in the right shoulder/shoulder tip ache",
        "dark urine/tea coloured urine",
        "yellow eyes/jaundice",
    ),
    _diagnosis(
        "gastroenterology",
        "appendicitis",
        "K35",
        "an operation",
        "pain moved to the lower right/pain shifted from the navel",
        "rebound tenderness/pain on letting go",
        "cannot hop/hopping hurts",
        "high white cells/raised white count",
        _FEVER,
    ),
    _diagnosis(
        "gastroenterology",
        "reflux disease",
        "K21",
        "an acid blocker",
        "burning behind the breastbone/heartburn",
        "sour taste/acid in the mouth",
        "hoarse in the morning/morning hoarseness",
        "worse after coffee/coffee makes it worse",
        "better with antacid/antacids help",
    ),
    _diagnosis(
        "gastroenterology",
        "crohn disease",
        "K50",
        "a colonoscopy",
        "diarrhoea for weeks/loose stools for a month",
        "mouth ulcers/sores in the mouth",
        "anal fistula/fistula near the anus",
        "raised calprotectin/high calprotectin",
        _WEIGHT_LOSS,
    ),
    _diagnosis(
        "endocrinology",
        "hypothyroidism",
        "E03",
        "thyroxine",
        "always cold/feels the cold",
        "dry skin/rough skin",
        "slow reflexes/sluggish reflexes",
        "puffy face/swollen eyelids",
        _FATIGUE,
    ),
    _diagnosis(
        "endocrinology",
        "hyperthyroidism",
        "E05",
        "carbimazole",
        "bulging eyes/staring eyes",
        "fine tremor/trembling fingers",
        "cannot stand heat/sweats in cool rooms",
        "low tsh/suppressed tsh",
        _WEIGHT_LOSS,
    ),
    _diagnosis(
        "endocrinology",
        "diabetes",
        "E11",
        "metformin",
        "great thirst/drinks five litres a day",
        "passes water often/frequent urination",
        "slow healing wounds/foot sore that will not heal",
        "sugar in the urine/glucose in the urine",
        "blurred sight after meals/vision blurs after eating",
    ),
    _diagnosis(
        "endocrinology",
        "addison disease",
        "E27",
        "hydrocortisone",
        "brown palms/dark palm creases",
        "craving for salt/eats salt by the spoon",
        "faint on standing/pressure drops on standing",
        "low morning cortisol/cortisol very low",
        "high potassium/potassium raised",
    ),
    _diagnosis(
        "rheumatology",
        "gout",
        "M10",
        "a uric acid test",
        "red hot big toe/inflamed big toe",
        "woke at night in agony/sudden night pain",
        "beer and meat at a feast/heavy feast the day before",
        "lumps on the ear/chalky lumps",
        "takes water tablets/on diuretics",
    ),
    _diagnosis(
        "rheumatology",
        "rheumatoid arthritis",
        "M06",
        "methotrexate",
        "stiff for an hour each morning/long morning stiffness",
        "swollen knuckles/puffy finger joints",
        "same joints on both sides/symmetric joints",
        "positive anti ccp/anti ccp found",
        _FATIGUE,
    ),
    _diagnosis(
        "rheumatology",
        "osteoporosis",
        "M81",
        "a bone density scan",
        "lost four centimetres in height/got shorter",
        "broken wrist after a small fall/wrist fracture on tripping",
        "rounded back/stooped spine",
        "years of cortisone tablets/long on cortisone",
        "mother broke her hip/family hip fracture",
    ),
    _diagnosis(
        "rheumatology",
        "carpal tunnel",
        "G56",
        "a wrist splint",
        "numb thumb and index finger/tingling in the first three fingers",
        "shakes the hand for relief/wakes and shakes the hand",
        "tapping the wrist tingles/positive tinel sign",
        "weak grip/drops cups",
        "thin thumb muscle/wasted thumb base",
    ),
)

TOPICS = tuple(dict.fromkeys(diagnosis.topic for diagnosis in DIAGNOSES))

REMARKS = (
    "appetite normal",
    "sleeps well",
    "lives alone",
    "never smoked",
    "two children",
    "works in an office",
    "retired teacher",
    "vaccinations up to date",
    "no known allergies",
    "walks the dog daily",
    "pulse regular",
    "hearing normal",
    "teeth in good order",
    "plays tennis",
    "drives a bus",
    "vegetarian",
    "skin of the back clear",
    "liver not felt",
    "hernia repair in youth",
    "tonsils removed",
    "takes vitamins",
    "wears glasses",
    "born abroad",
    "recently moved house",
    "came with a neighbour",
    "family history unremarkable",
    "blood count normal",
    "kidney values normal",
    "speech clear",
    "mood good",
)

_STYLES = 4


def _who(case: Case, style: int) -> str:
    age, woman = case.person.age, case.person.woman
    return (
        f"{age} year old {'woman' if woman else 'man'}",
        f"{'F' if woman else 'M'} {age}",
        f"{'Mrs' if woman else 'Mr'} X, aged {age}",
        f"{'female' if woman else 'male'}, {age} y",
    )[style]


def _coding(who: str, stated: tuple[str, ...], style: int, variant: float) -> str:
    first = variant < 0.5
    return (
        f"Coding sheet. {who}. Findings: {'; '.join(stated)}. Code:"
        if first
        else f"To be coded: {who} with {', '.join(stated)}. Code:",
        f"CODE? {who} | {' | '.join(stated)}" if first else f"{who} - {' - '.join(stated)} - CODE?",
        f"Please code this stay. {who}. {'. '.join(stated)}."
        if first
        else f"{who} was seen with {', '.join(stated)}. Please code.",
        f"dx+code: {who}: {', '.join(stated)}" if first else f"{who} // {' / '.join(stated)} // dx+code",
    )[style]


def _note(who: str, stated: tuple[str, ...], style: int, variant: float) -> str:
    first = variant < 0.5
    return (
        f"Clinic letter. {who}. History: {'; '.join(stated)}. Conclusion:"
        if first
        else f"Ward round. {who}, {', '.join(stated)}. Conclusion:",
        f"{who} | {' | '.join(stated)} | IMP" if first else f"ER {who}: {', '.join(stated)}. IMP",
        f"Dear colleague, I saw {who}: {', '.join(stated)}."
        if first
        else f"Thank you for sending {who}. We found {', '.join(stated)}.",
        f"note {who} / {' / '.join(stated)} / assessment" if first else f"{who}. {'. '.join(stated)}. assessment",
    )[style]


def _conclusion(diagnosis: Outcome, style: int) -> str:
    return (
        f"{diagnosis.name}; we advise {diagnosis.action}.",
        f"{diagnosis.name} -> {diagnosis.action}",
        f"This is {diagnosis.name}, so please arrange {diagnosis.action}.",
        f"{diagnosis.name}, plan {diagnosis.action}",
    )[style]


def _question(who: str, stated: tuple[str, ...], style: int, next_step: bool) -> str:
    listed = ", ".join(stated)
    if next_step:
        return (
            f"Question: which next step suits a {who} with {listed}?",
            f"Q {who}, {listed}. NEXT?",
            f"What would you arrange for {who}? Noted: {listed}.",
            f"q: {who}, {listed}, what to do",
        )[style]
    return (
        f"Question: what explains {listed} in a {who}?",
        f"Q {who}, {listed}. WHAT IS IT?",
        f"What is the matter with {who}? Noted: {listed}.",
        f"q: {who}, {listed}, likely cause",
    )[style]


def render(case: Case, style: int, variant: float) -> Text:
    """The record's text in the house style; see `domain.Domain.render`."""
    who, diagnosis = _who(case, style), case.outcome
    if case.kind == "coding":
        return Text(_coding(who, case.stated, style, variant), f"{diagnosis.name}, {diagnosis.code}")
    if case.kind == "note":
        return Text(_note(who, case.stated, style, variant), _conclusion(diagnosis, style))
    next_step = variant < 0.5
    return Text(_question(who, case.stated, style, next_step), diagnosis.action if next_step else diagnosis.name)


HOSPITALS = Domain("hospitals", TOPICS, DIAGNOSES, REMARKS, _STYLES, render, exact="coding")
