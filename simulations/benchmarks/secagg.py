"""Secure aggregation beside the primitives of Flower's own SecAgg+, at the same sizes in the same run, one thread each.

Ours is the real protocol: one `Participant` a member and an `Aggregator`, through all phases, with one member that
falls silent after the shares. What the members sent is kept, so that the coordinator's part can be played again and
again; each time its sum must equal the plain sum of the quantised vectors bit for bit.

Flower's primitives are put together as its `secaggplus_mod` does at a member and its `SecAggPlusWorkflow` at the
coordinator, with their defaults and the same threshold; the update comes in tensors of 65,536 elements, as LoRA's do,
which suits its way to work better than one long vector. Everything that is timed is computed, but the coordinator's
part takes a few masked inputs and the shares of one member over and over, for its arithmetic costs the same for any;
and where opening all secrets would take more than a minute, a few are timed and multiplied, and the figure is marked as
extrapolated.

The limit of masking is a plain loop written here: AES-256-CTR from zeros, added in place, with the best block size.
"""

from __future__ import annotations

import copy
import os
import re
import statistics
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from common.adapter import Vector
from common.config import QuantiseConfig
from common.errors import ConfigError, RunStopped
from common.fixed_point import Layout, Ring, decode, encode, pack
from common.randomness import seeded
from common.secagg.aggregator import Aggregator
from common.secagg.attempt import Attempt
from common.secagg.identity import Identity, Roster
from common.secagg.masks import KEY_BYTES, add_masks
from common.secagg.messages import Consent, FromMember, Inbox, KeyList, Keys, MaskedInput, Revealed, Shares
from common.secagg.participant import Participant, restore_in_simulation, snapshot_for_simulation
from common.secagg.terms import Terms, smallest_cohort
from common.wire import Wire, from_wire, size, to_wire

SEED = 1
HEADLINE = "8Mx16"  # the case whose figures stand at the top
FEWEST, MOST = 4, 1024  # members; three can lose none
SHORTEST, LONGEST = 1_000, 64_000_000  # parameters
COLLUDERS = 1
TENSOR = 1 << 16  # elements of one of an adapter's tensors
LIMIT_BLOCKS = tuple(1 << bits for bits in range(13, 19))  # elements that the plain loop takes at a time
PAIRS = 5  # of our loop and the plain one, for every repeat

# What Flower's workflow sets by default, and the records of a member.
CLIP, TARGET_RANGE, MOD_RANGE, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
EXAMPLES = 250
PAYLOADS = 3  # masked inputs of Flower that are really made
TOO_LONG = 60.0  # seconds for all of Flower's secrets, above which a few are timed
SLOW = 5.0  # seconds, above which a measurement of keys and shares is not repeated

UNITS = {"": 1, "k": 1_000, "M": 1_000_000}
Message = TypeVar("Message", bound=FromMember)
Tensors = list[NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One size. members: n, of which one falls silent."""

    parameters: int
    members: int

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        unit = next(unit for unit in ("M", "k", "") if self.parameters % UNITS[unit] == 0)
        return f"{self.parameters // UNITS[unit]}{unit}x{self.members}"

    @property
    def terms(self) -> Terms:
        return Terms.of(self.members, COLLUDERS, smallest_cohort(COLLUDERS))

    @property
    def layout(self) -> Layout:
        quantise = QuantiseConfig()
        return Layout(self.parameters, self.members, quantise.clip, quantise.bits, quantise.weight_bits)

    def update(self) -> Vector:
        """What a member trained."""
        return seeded(SEED, "bench", "secagg").normal(0, 0.02, self.parameters).astype(np.float32)


def cases(text: str) -> list[Case]:
    """The cases that a command line names, such as `1Mx8,250kx16`. Raises ConfigError for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})([kM]?)x([0-9]{1,9})", part.strip())
        case = Case(int(match[1]) * UNITS[match[2]], int(match[3])) if match else Case(0, 0)
        if not (SHORTEST <= case.parameters <= LONGEST and FEWEST <= case.members <= MOST):
            raise ConfigError(
                f"--cases: expected parameters x members with commas, such as 1Mx8,250kx16, of {SHORTEST} to {LONGEST} "
                f"parameters and {FEWEST} to {MOST} members; found {part!r:.40}"
            )
        found.append(case)
    return list(dict.fromkeys(found))


def bench(wanted: Sequence[Case], repeats: int, console: Console) -> dict[str, Any]:
    """Measures the cases and returns figures by case; those of 8Mx16, or of the last one, stand at the top as well.

    Raises RunStopped when a sum is not exact.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in wanted:
        console.print(f"{case.name}: {case.parameters} parameters, {case.members} members, one falls silent ...")
        began = time.perf_counter()
        found[case.name] = _measure(case, repeats)
        console.print(f"  {time.perf_counter() - began:.0f} s")
    for table in _tables(found):
        console.print(table)
    headline = HEADLINE if HEADLINE in found else wanted[-1].name
    top = found[headline]
    return {
        "headline": headline,
        "mask_speedup": round(top["masking"]["speedup"], 3),
        "mask_vs_limit": round(top["draw_and_add"]["vs_limit"], 3),
        "unmask_speedup": round(top["coordinator"]["speedup"], 3),
        "upload_bytes_per_parameter": round(top["upload"]["bytes_per_parameter"], 3),
        "upload_bytes_per_parameter_with_keys": round(top["upload"]["bytes_per_parameter_with_keys"], 3),
        "coordinator_memory_64_to_8": _ratio(found, "1Mx64", "1Mx8"),
        "repeats": repeats,
        "cases": found,
    }


def _ratio(found: Mapping[str, Mapping[str, Any]], many: str, few: str) -> float | None:
    if many not in found or few not in found:
        return None
    peaks = [int(found[name]["coordinator_peak_bytes"]) for name in (many, few)]
    return round(peaks[0] / peaks[1], 3)


class Clock:
    """Seconds by what they were spent on; a sample each time.

    Of the processor, not of the wall: both sides wait for nothing, and other processes should not count for either.
    """

    def __init__(self) -> None:
        self._samples: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self._samples[what].append(time.process_time() - began)

    def medians(self, *kinds: str) -> dict[str, float]:
        """The median of each kind, and their sum as `total`."""
        found = {kind: statistics.median(self._samples[kind]) for kind in kinds}
        return {**found, "total": sum(found.values())}


def _measure(case: Case, repeats: int) -> dict[str, Any]:
    """All figures of a case; ours and Flower's take turns."""
    attempt = _attempt(case)
    own, their_own, coordinator, their_coordinator = Clock(), Clock(), Clock(), Clock()
    record, ready = _play(attempt, case.update(), own, coordinator, repeats)
    them = _their_keys(case, their_own)
    for _ in range(repeats - 1):
        if coordinator.medians("keys", "shares")["total"] < SLOW:
            again = Aggregator(attempt, record.roster)
            _take_keys(again, record.keys, coordinator)
            _take_shares(again, record.shares, coordinator)
        if their_own.medians("keys", "seal", "open")["total"] < SLOW:
            _their_keys(case, their_own)

    # Each arm runs once untimed right before, so that neither pays for pages that the system has to find anew.
    masking, their_masking = Clock(), Clock()
    update = case.update()
    tensors = [update[start : start + TENSOR] for start in range(0, case.parameters, TENSOR)]
    payloads: list[list[bytes]] = []
    for _ in range(repeats):
        for clock in (Clock(), masking):
            _our_masking(update, case.layout, case.members, clock)
        for clock in (Clock(), their_masking):
            payloads = [*payloads, _their_masking(tensors, case.members, clock)][-PAYLOADS:]
    del update, tensors
    draw_and_add = _draw_and_add(case, repeats)

    opened, extrapolated = _their_secrets_estimated(case, them)
    for _ in range(repeats):
        for clock in (Clock(), coordinator):
            _finish(copy.deepcopy(ready), record, clock)
        for clock in (Clock(), their_coordinator):
            _their_unmask(_their_sum(payloads, case.members, clock), case.members, them, clock)
        if not extrapolated:
            with their_coordinator("secrets"):
                _their_secrets(case, them)
    peak, held = _memory(record)

    ours = {
        "masking": masking.medians("quantise", "mask", "pack"),
        "coordinator": coordinator.medians("sum", "unmask", "decode"),
    }
    theirs: dict[str, Any] = {"masking": their_masking.medians("quantise", "mask", "pack")}
    if extrapolated:
        found = their_coordinator.medians("sum", "unmask", "decode")
        theirs["coordinator"] = {**found, "secrets": opened, "total": found["total"] + opened}
    else:
        theirs["coordinator"] = their_coordinator.medians("sum", "secrets", "unmask", "decode")
    return {
        "parameters": case.parameters,
        "members": case.members,
        "threshold": case.terms.threshold,
        "ring_bits": case.layout.ring_bits,
        "masking": _side_by_side(ours["masking"], theirs["masking"]),
        "draw_and_add": draw_and_add,
        "coordinator": {
            **_side_by_side(ours["coordinator"], theirs["coordinator"]),
            "flower_secrets_extrapolated": extrapolated,
        },
        "keys_and_shares": {
            "member": {
                "silotune": own.medians("keys", "seal", "open", "consent", "reveal"),
                "flower": their_own.medians("keys", "seal", "open"),
            },
            "coordinator": {"silotune": coordinator.medians("keys", "shares", "consents", "revealed")},
        },
        "upload": _upload(record, payloads[-1], them, case),
        "coordinator_peak_bytes": peak,
        "coordinator_key_bytes": held,
    }


def _side_by_side(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    return {"silotune": dict(ours), "flower": dict(theirs), "speedup": theirs["total"] / ours["total"]}


# --- Ours ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What each member sent in an attempt, by name, and what has to come out."""

    attempt: Attempt
    roster: Roster
    keys: Mapping[str, Keys]
    shares: Mapping[str, Shares]
    masked: Mapping[str, MaskedInput]
    consents: Mapping[str, Consent]
    revealed: Mapping[str, Revealed]
    expected: Ring


def _attempt(case: Case) -> Attempt:
    cohort = tuple(f"institution-{number:04d}" for number in range(case.members))
    return Attempt("bench", 1, 1, os.urandom(32).hex(), cohort, case.terms, case.layout)


def _play(
    attempt: Attempt, update: Vector, clock: Clock, coordinator: Clock, repeats: int
) -> tuple[Record, Aggregator]:
    """A whole attempt, member after member, and its coordinator as it was before the first masked input.

    Timed is what each member does beside its vector, and what the coordinator does up to then.
    """
    layout = attempt.layout
    identities = {name: Identity.generate(name) for name in attempt.cohort}
    roster = Roster.of(*identities.values())
    members = {name: Participant(attempt, identities[name], roster, simulated=True) for name in attempt.cohort}
    # The one in the middle chooses as many pair seeds as it has to open.
    silent = attempt.cohort[len(attempt.cohort) // 2]
    aggregator = Aggregator(attempt, roster)

    keys: dict[str, Keys] = {}
    for name, member in members.items():
        with clock("keys"):
            keys[name] = member.keys()
    key_list = _take_keys(aggregator, keys, coordinator)

    shares: dict[str, Shares] = {}
    for name, member in members.items():
        with clock("seal"):
            shares[name] = member.on_key_list(key_list)
    inboxes = _take_shares(aggregator, shares, coordinator)
    ready = copy.deepcopy(aggregator)

    _time_opening(members.pop(silent), identities[silent], roster, inboxes[silent], clock, repeats)
    masked: dict[str, MaskedInput] = {}
    expected = np.zeros(layout.length, np.uint32)
    for number, (name, member) in enumerate(members.items()):
        weight = 1 + number % layout.max_weight
        vector = encode(np.roll(update, number), weight, {"train_tokens": 100}, layout, seeded(SEED, name))
        expected += vector
        masked[name] = member.on_inbox(inboxes[name], vector)
        aggregator.on_masked(name, masked[name])
    expected &= np.uint32(layout.ring_mask)
    survivors = aggregator.survivors()

    consents: dict[str, Consent] = {}
    for name, member in members.items():
        with clock("consent"):
            consents[name] = member.on_survivors(survivors, lambda _: None)
        aggregator.on_consent(name, consents[name])
    agreed = aggregator.consents()
    revealed: dict[str, Revealed] = {}
    for name, member in members.items():
        with clock("reveal"):
            revealed[name] = member.on_consents(agreed)
    return Record(attempt, roster, keys, shares, masked, consents, revealed, expected), ready


def _time_opening(
    member: Participant, identity: Identity, roster: Roster, inbox: Inbox, clock: Clock, repeats: int
) -> None:
    """What a member does with its inbox, by one whose vector is empty but for its counters; its answer goes nowhere."""
    snapshot = snapshot_for_simulation(member)
    short = replace(member.attempt, layout=replace(member.attempt.layout, parameters=0))
    for _ in range(repeats):
        again = restore_in_simulation(snapshot, short, identity, roster)
        with clock("open"):
            again.on_inbox(inbox, np.zeros(short.layout.length, np.uint32))


def _take_keys(aggregator: Aggregator, keys: Mapping[str, Keys], clock: Clock) -> KeyList:
    with clock("keys"):
        for name, message in keys.items():
            aggregator.on_keys(name, message)
        return aggregator.key_list()


def _take_shares(aggregator: Aggregator, shares: Mapping[str, Shares], clock: Clock) -> Mapping[str, Inbox]:
    with clock("shares"):
        for name, message in shares.items():
            aggregator.on_shares(name, message)
        return aggregator.inboxes()


def _finish(aggregator: Aggregator, record: Record, clock: Clock) -> None:
    """The coordinator's side from the first masked input on. Raises RunStopped when the sum is not exact."""
    with clock("sum"):
        for name, masked in record.masked.items():
            aggregator.on_masked(name, masked)
    with clock("consents"):
        aggregator.survivors()
        for name, consent in record.consents.items():
            aggregator.on_consent(name, consent)
        aggregator.consents()
    with clock("revealed"):
        for name, revealed in record.revealed.items():
            aggregator.on_revealed(name, revealed)
    with clock("unmask"):
        total = aggregator.unmask()
    with clock("decode"):
        decode(total, record.attempt.layout, members=len(record.masked))
    _require_exact(total, record.expected)


def _require_exact(total: Ring, expected: Ring) -> None:
    if not np.array_equal(total, expected):
        raise RunStopped("the unmasked sum is not the plain sum of the quantised vectors: no figure means anything")


def _memory(record: Record) -> tuple[int, int]:
    """Most bytes that a coordinator holds from the first masked input to the unmasked sum; and what of it, at the first
    masked input, are keys and sealed seeds.

    Every message is read from its wire form when it is its turn, so that it counts as long as the coordinator keeps it.
    """
    tracemalloc.start()
    try:
        aggregator = Aggregator(record.attempt, record.roster)
        for name, keys in record.keys.items():
            aggregator.on_keys(name, _arrived(keys))
        aggregator.key_list()
        for name, shares in record.shares.items():
            aggregator.on_shares(name, _arrived(shares))
        aggregator.inboxes()
        held = tracemalloc.get_traced_memory()[0] - 4 * record.attempt.layout.length
        tracemalloc.reset_peak()
        for name, masked in record.masked.items():
            aggregator.on_masked(name, _arrived(masked))
        aggregator.survivors()
        for name, consent in record.consents.items():
            aggregator.on_consent(name, _arrived(consent))
        aggregator.consents()
        for name, revealed in record.revealed.items():
            aggregator.on_revealed(name, _arrived(revealed))
        total = aggregator.unmask()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    _require_exact(total, record.expected)
    return peak, held


def _arrived(message: Message) -> Message:
    """The message as it comes from the wire, with memory of its own."""
    sent = to_wire(message)
    return cast(Message, from_wire(Wire(sent.kind, sent.text, {key: a.copy() for key, a in sent.arrays.items()})))


def _our_masking(update: Vector, layout: Layout, members: int, clock: Clock) -> None:
    """What a member does with its vector."""
    keys = [os.urandom(KEY_BYTES) for _ in range(members)]  # a self mask and one for each other member
    plus, minus = keys[: members // 2], keys[members // 2 :]
    rng = seeded(SEED, "rounding")
    with clock("quantise"):
        vector = encode(update, 3, {"train_tokens": 100}, layout, rng)
    with clock("mask"):  # as Participant.on_inbox does, once it has the keys
        masked = vector.copy()
        add_masks(masked, plus, minus)
        masked &= np.uint32(layout.ring_mask)
    with clock("pack"):
        pack(masked, layout.ring_bits)


def _draw_and_add(case: Case, repeats: int) -> dict[str, Any]:
    """Drawing and adding the masks, by us and by the plain loop in turns, once its best block size is found."""
    keys = [os.urandom(KEY_BYTES) for _ in range(case.members)]
    plus, minus = keys[: case.members // 2], keys[case.members // 2 :]
    elements = np.zeros(case.layout.length, np.uint32)
    searched = Clock()
    for _ in range(3):
        for block in LIMIT_BLOCKS:
            with searched(str(block)):
                plain_masking(elements, keys, block)
    blocks = {block: searched.medians(str(block))["total"] for block in LIMIT_BLOCKS}
    best = min(LIMIT_BLOCKS, key=lambda block: blocks[block])
    clock = Clock()
    for _ in range(PAIRS * repeats):
        with clock("silotune"):
            add_masks(elements, plus, minus)
        with clock("limit"):
            plain_masking(elements, keys, best)
    found = clock.medians("silotune", "limit")
    return {
        "silotune": found["silotune"],
        "limit": found["limit"],
        "vs_limit": found["silotune"] / found["limit"],
        "best_block": best,
        "searched": {str(block): seconds for block, seconds in blocks.items()},
    }


def plain_masking(elements: Ring, keys: Sequence[bytes], block: int) -> None:
    """Adds the streams of all keys, `block` elements at a time: nothing but the cipher and numpy."""
    ciphers = [Cipher(AES(key), CTR(bytes(16))).encryptor() for key in keys]
    zeros, drawn = memoryview(bytes(4 * block)), bytearray(4 * block + 16)
    numbers = np.frombuffer(drawn, np.uint32, block)
    for start in range(0, len(elements), block):
        part = elements[start : start + block]
        for cipher in ciphers:
            cipher.update_into(zeros[: part.nbytes], drawn)
            np.add(part, numbers[: len(part)], out=part)


# --- Flower's ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Them:
    """A member of Flower's protocol after its shares. public: of all other members."""

    private: bytes
    public: Sequence[bytes]
    seed: bytes
    seed_shares: Sequence[bytes]
    key_shares: Sequence[bytes]
    key_bytes: int
    sealed_bytes: int


def _their_keys(case: Case, clock: Clock) -> Them:
    """What a member does before and beside its vector: `_setup`, `_share_keys`, opening, and the keys of the pairs."""
    others = [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(case.members - 1)]
    with clock("keys"):
        (sk1, pk1), (sk2, pk2) = generate_key_pairs(), generate_key_pairs()
        private, public = private_key_to_bytes(sk1), public_key_to_bytes(pk1)
        private2, public2 = private_key_to_bytes(sk2), public_key_to_bytes(pk2)
    with clock("seal"):
        seed = os.urandom(32)
        seed_shares = create_shares(seed, case.terms.threshold, case.members)
        key_shares = create_shares(private, case.terms.threshold, case.members)
        shared, sealed = [], []
        for number, other in enumerate(others):
            shared.append(generate_shared_key(bytes_to_private_key(private2), bytes_to_public_key(other)))
            plaintext = share_keys_plaintext_concat(0, number, seed_shares[number], key_shares[number])
            sealed.append(encrypt(shared[-1], plaintext))
    with clock("open"):
        # It opens what it sealed itself: what others sealed for it is as long.
        for key, ciphertext, other in zip(shared, sealed, others, strict=True):
            share_keys_plaintext_separate(decrypt(key, ciphertext))
            generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(other))
    return Them(
        private,
        others,
        seed,
        seed_shares,
        key_shares,
        len(public) + len(public2),
        sum(len(ciphertext) for ciphertext in sealed),
    )


def _their_masking(tensors: Sequence[Vector], members: int, clock: Clock) -> list[bytes]:
    """What `_collect_masked_vectors` does with an update, once it has the keys of the pairs."""
    seed, pairs = os.urandom(32), [os.urandom(44) for _ in range(members - 1)]
    with clock("quantise"):
        ratio = round(EXAMPLES / MAX_WEIGHT * TARGET_RANGE)
        weighted = parameters_multiply(list(tensors), ratio / TARGET_RANGE)
        found: Tensors = factor_combine(ratio, list(quantize(weighted, CLIP, TARGET_RANGE)))
    with clock("mask"):
        shapes = [array.shape for array in found]
        found = parameters_addition(found, list(pseudo_rand_gen(seed, MOD_RANGE, shapes)))
        for number, key in enumerate(pairs):
            mask: Tensors = list(pseudo_rand_gen(key, MOD_RANGE, shapes))
            found = parameters_addition(found, mask) if number % 2 else parameters_subtraction(found, mask)
        found = parameters_mod(found, MOD_RANGE)
    with clock("pack"):
        return [ndarray_to_bytes(array) for array in found]


def _their_sum(payloads: Sequence[Sequence[bytes]], members: int, clock: Clock) -> Tensors:
    """The sum that `collect_masked_vectors_stage` makes of all masked inputs but one."""
    with clock("sum"):
        total: Tensors | None = None
        for number in range(members - 1):
            arrived: Tensors = [bytes_to_ndarray(array) for array in payloads[number % len(payloads)]]
            total = arrived if total is None else parameters_addition(total, arrived)
        return parameters_mod(total or [], MOD_RANGE)


def _their_secrets_estimated(case: Case, them: Them) -> tuple[float, bool]:
    """Seconds to open every member's secret, by a few of them; and whether that is too long to do all."""
    clock, threshold = Clock(), case.terms.threshold
    for _ in range(3):
        with clock("seed"):
            combine_shares(list(them.seed_shares[:threshold]))
    with clock("key"):
        combine_shares(list(them.key_shares[:threshold]))
    median = clock.medians("seed", "key")
    seconds = median["seed"] * (case.members - 1) + median["key"]
    return seconds, seconds > TOO_LONG


def _their_secrets(case: Case, them: Them) -> None:
    """Opens a seed for every survivor and the private key of the silent one, from t shares each.

    The workflow takes all shares that came, which are more and take longer.
    """
    threshold = case.terms.threshold
    seeds = {combine_shares(list(them.seed_shares[:threshold])) for _ in range(case.members - 1)}
    if seeds != {them.seed} or combine_shares(list(them.key_shares[:threshold])) != them.private:
        raise RunStopped("a secret that was shared by Flower's functions did not come back")


def _their_unmask(total: Tensors, members: int, them: Them, clock: Clock) -> None:
    """What `unmask_stage` does once it has the secrets."""
    with clock("unmask"):
        for _ in range(members - 1):
            mask: Tensors = list(pseudo_rand_gen(them.seed, MOD_RANGE, get_parameters_shape(total)))
            total = parameters_subtraction(total, mask)
        for number, public in enumerate(them.public):
            key = generate_shared_key(bytes_to_private_key(them.private), bytes_to_public_key(public))
            mask = list(pseudo_rand_gen(key, MOD_RANGE, get_parameters_shape(total)))
            total = parameters_addition(total, mask) if number % 2 else parameters_subtraction(total, mask)
        total = parameters_mod(total, MOD_RANGE)
    with clock("decode"):
        ratio, total = factor_extract(total)
        scale = TARGET_RANGE / max(ratio, 1)  # of inputs that are used twice the ratio means nothing
        for vector in dequantize(total, CLIP, TARGET_RANGE):
            vector += -(members - 2) * CLIP
            vector *= scale


# --- Figures -------------------------------------------------------------------------------------------------------


def _upload(record: Record, payload: Sequence[bytes], them: Them, case: Case) -> dict[str, Any]:
    """Bytes that a member sends in an attempt, by message; ours are those of the member that sends most."""
    sent = {
        name: {
            type(message).__name__: size(to_wire(message))
            for message in (
                record.keys[name],
                record.shares[name],
                record.masked[name],
                record.consents[name],
                record.revealed[name],
            )
        }
        for name in record.masked
    }
    ours = max(sent.values(), key=lambda sizes: sum(sizes.values()))
    threshold_shares = len(them.seed_shares[0]) * (case.members - 1) + len(them.key_shares[0])
    theirs = {
        "keys": them.key_bytes,
        "shares": them.sealed_bytes,
        "masked": sum(len(array) for array in payload),
        "revealed": threshold_shares,
    }
    return {
        "bytes_per_parameter": ours["MaskedInput"] / case.parameters,
        "bytes_per_parameter_with_keys": sum(ours.values()) / case.parameters,
        "flower_bytes_per_parameter": theirs["masked"] / case.parameters,
        "flower_bytes_per_parameter_with_keys": sum(theirs.values()) / case.parameters,
        "silotune": ours,
        "flower": theirs,
    }


def _tables(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Two rows a case, ours and Flower's; times in milliseconds."""
    vector = _table("a member's vector, ms", "quantise", "mask", "pack", "total", "speedup", "of the limit")
    total = _table("the coordinator's sum, ms", "sum", "secrets", "unmask", "decode", "total", "speedup")
    beside = _table("keys and shares, ms", "keys", "seal", "open", "consent", "reveal", "total", "coordinator")
    upload = _table("bytes", "bits", "a parameter", "with keys", "coordinator, MiB", "of it keys")
    if any(case["coordinator"]["flower_secrets_extrapolated"] for case in found.values()):
        total.caption = "~ extrapolated: opening all would take more than a minute, so a few were"
    for name, case in found.items():
        for arm, shown in (("silotune", name), ("flower", "  Flower")):
            ours = arm == "silotune"
            masking, coordinator, keys = case["masking"], case["coordinator"], case["keys_and_shares"]
            vector.add_row(
                shown,
                *_milliseconds(masking[arm], "quantise", "mask", "pack", "total"),
                *(f"{ratio:.2f}" for ratio in (masking["speedup"], case["draw_and_add"]["vs_limit"]) if ours),
            )
            mark = "~" if coordinator["flower_secrets_extrapolated"] else ""
            total.add_row(
                shown,
                *_milliseconds(coordinator[arm], "sum"),
                *(("" if ours else mark) + text for text in _milliseconds(coordinator[arm], "secrets")),
                *_milliseconds(coordinator[arm], "unmask", "decode"),
                *(("" if ours else mark) + text for text in _milliseconds(coordinator[arm], "total")),
                *([f"{mark}{coordinator['speedup']:.2f}"] if ours else []),
            )
            beside.add_row(
                shown,
                *_milliseconds(keys["member"][arm], "keys", "seal", "open", "consent", "reveal", "total"),
                *_milliseconds(keys["coordinator"].get(arm, {}), "total"),
            )
            prefix = "" if ours else "flower_"
            upload.add_row(
                shown,
                str(case["ring_bits"]) if ours else "64",
                f"{case['upload'][prefix + 'bytes_per_parameter']:.3f}",
                f"{case['upload'][prefix + 'bytes_per_parameter_with_keys']:.3f}",
                *(f"{case[f'coordinator_{key}_bytes'] / 2**20:.1f}" for key in ("peak", "key") if ours),
            )
    yield from (vector, total, beside, upload)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("case")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _milliseconds(seconds: Mapping[str, float], *kinds: str) -> list[str]:
    """As a table shows them; a dash for what an arm does not do by itself."""
    found = [seconds.get(kind) for kind in kinds]
    return ["–" if value is None else f"{1000 * value:.{1 if value < 0.1 else 0}f}" for value in found]
