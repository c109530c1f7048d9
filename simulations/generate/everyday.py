"""Everyday knowledge of the general text: clues that imply an animal, a tool, a job and so on, each with its place.

It teaches the habit of reading clues and naming what they imply, on subjects no institution deals with.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """name: the answer. place: where it belongs, asked for together with the name. clues: phrases that imply it."""

    group: str
    name: str
    place: str
    clues: tuple[str, ...]


_LISTS = {
    "animal": """
        giraffe: savanna: very long neck, eats from treetops, spotted coat, tall legs
        zebra: plain: black stripes, short mane, runs in herds, kicks lions
        penguin: ice: cannot fly, black and white feathers, slides on its belly, swims after fish
        owl: barn: hunts in the dark, turns its head round, silent wings, big round face
        beaver: river: flat tail, builds dams, gnaws trees, orange teeth
        bee: hive: makes honey, stings once, dances for its sisters, visits flowers
        frog: pond: croaks at dusk, long sticky tongue, lays spawn, green jumper
    """,
    "fruit": """
        banana: bunch: yellow peel, curved shape, monkeys love it, soft and sweet
        lemon: tree: very sour, yellow rind, goes into tea, makes a face
        cherry: orchard: red with a stone, grows in pairs, put on a cake, spit the stone
        grape: vine: made into wine, grows in bunches, dried as raisins, pressed in autumn
        pumpkin: patch: orange and huge, carved with a grin, made into soup, lit by a candle
        apple: garden: keeps doctors away, red cheeks, baked in a pie, core with pips
    """,
    "tool": """
        hammer: bench: drives nails, heavy head, hits thumbs, claw at the back
        saw: hook: sharp teeth, cuts planks, makes dust, moves back and forth
        ladder: shed: many rungs, leans on a wall, climbed with care, unlucky to walk under
        broom: cupboard: sweeps the floor, long handle, ridden by witches, bundle of twigs
        kettle: stove: boils water, sings when hot, has a spout, makes steam
        scissors: drawer: two blades, cuts paper, opens and closes, used on hair
        umbrella: stand: opens in showers, turned by storms, folds away, forgotten on trains
        clock: tower: two hands, strikes twelve, ticks all day, wound up weekly
    """,
    "job": """
        baker: oven: up before dawn, white apron, kneads dough, smells of rolls
        fisher: harbour: throws nets, boat with a lamp, sells at the quay, knows the tide
        firefighter: station: red engine, long hose, slides down a pole, rescues kittens
        teacher: classroom: marks tests, writes on a board, rings for the break, explains fractions
        farmer: barnyard: milks cows, drives a tractor, watches the clouds, sows wheat
        painter: studio: mixes colours, stained overalls, stands at an easel, hangs in a gallery
        gardener: greenhouse: trims hedges, waters roses, pulls weeds, green thumb
    """,
    "sport": """
        tennis: court: yellow ball, strings in a frame, net in the middle, white shorts
        chess: board: king and queen, sixteen pawns, silent thinking, ends with a mate
        swimming: pool: rubber cap, lanes and laps, smell of chlorine, dive at the start
        football: stadium: eleven players, goalkeeper with gloves, red cards, long whistle
        archery: range: bent bow, feathered arrow, coloured target, steady arm
    """,
    "vehicle": """
        tram: rails: bell at the stop, wire overhead, runs in the street, ticket machine
        balloon: sky: basket below, hot air, drifts with the wind, burner roars
        sledge: hill: glides on snow, wooden runners, pulled by huskies, children shriek
        bicycle: path: two wheels, bell on the handle, pumped tyres, pedals and chain
        rocket: launch pad: counts down, tail of fire, leaves the earth, three stages
    """,
}


def _parse(group: str, line: str) -> Thing:
    name, place, clues = (part.strip() for part in line.split(":"))
    return Thing(group, name, place, tuple(clue.strip() for clue in clues.split(",")))


THINGS = tuple(_parse(group, line) for group, text in _LISTS.items() for line in text.strip().splitlines())

PEOPLE = (
    "a girl",
    "a boy",
    "my aunt",
    "the mayor",
    "our neighbour",
    "an old sailor",
    "the teacher",
    "her brother",
    "a student",
    "the nurse",
    "a clerk",
    "the doctor",
    "my cousin",
    "a traveller",
    "the cook",
    "a visitor",
)
VERBS = (
    "saw",
    "drew",
    "remembered",
    "described",
    "talked about",
    "looked for",
    "asked about",
    "wrote about",
    "pointed at",
    "forgot",
    "dreamed of",
    "mentioned",
)
TIMES = (
    "on monday",
    "in the morning",
    "last week",
    "after lunch",
    "at night",
    "in winter",
    "before the holiday",
    "yesterday",
    "in june",
    "every year",
    "at noon",
    "for an hour",
    "once more",
    "in the end",
)
FEELINGS = (
    "happy",
    "tired",
    "proud",
    "cold",
    "late",
    "curious",
    "silent",
    "pleased",
    "hungry",
    "ready",
    "surprised",
    "calm",
)
