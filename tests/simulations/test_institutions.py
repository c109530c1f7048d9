"""Institutions of the simulation: what the configuration can ask of them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict

from common import config_files
from common.base_model import fingerprint
from common.config import Config, DataConfig, named
from common.config_rules import RULES
from common.fixed_point import Ring
from common.messages import Hello, Introduction, Refused, Request, TrainRequest
from common.models import load
from common.secagg.aggregator import Aggregator
from common.secagg.identity import Roster
from common.secagg.reasons import ATTEMPT_OVER, ATTEMPT_UNKNOWN
from simulations import prepare
from simulations.identities import SimulatedIdentities
from simulations.institutions import FAULTS, SILENT, VirtualInstitutions, session_in, virtual
from simulations.layout import RunDirectory
from tests.client.conftest import make_plan, secured


def test_the_configuration_knows_every_fault_and_no_other() -> None:
    rule = RULES["simulation.faults"]
    known = [*FAULTS, SILENT]
    assert all(rule.holds([f"riverside:{fault}"]) and fault in rule.allowed for fault in known)
    assert not rule.holds(["riverside:other"])


def test_what_travels_with_every_message_stays_small() -> None:
    names = [f"institution-{number:04d}" for number in range(1000)]
    config = Config(data=DataConfig(institutions=named(*names), train_records=[40] * 1000))
    institutions = VirtualInstitutions.of(config, Path("/run"))
    assert institutions.names == tuple(names)
    assert len(pickle.dumps(institutions)) < len(pickle.dumps(tuple(names))) + 4000
    # With identities there is one secret more for all, and each name is referred to once more.
    secure = VirtualInstitutions.of(config, Path("/run"), SimulatedIdentities.fresh(config.data.names))
    assert len(pickle.dumps(secure)) < len(pickle.dumps(institutions)) + 5 * len(names) + 300


def test_identities_are_the_same_wherever_they_are_unpacked_and_others_in_every_simulation() -> None:
    names = ("riverside", "northgate", "lakeside")
    identities = SimulatedIdentities.fresh(names)
    elsewhere = pickle.loads(pickle.dumps(identities))
    assert elsewhere.roster() == identities.roster() == Roster.of(*(identities.identity(name) for name in names))
    assert len(set(identities.roster().keys.values())) == 3
    others = SimulatedIdentities.fresh(names)
    assert not set(others.roster().keys.values()) & set(identities.roster().keys.values())
    statement = b"of riverside"
    assert identities.roster().verifies("riverside", elsewhere.identity("riverside").sign(statement), statement)
    assert identities.secret.hex() not in repr(identities)
    assert repr(identities.secret) not in repr(identities)


def context(number: int, state: RecordDict) -> Context:
    return Context(run_id=1, node_id=7, node_config={"partition-id": number}, state=state, run_config={})


def moved(found: Context) -> Context:
    """What another process gets to see of a node."""
    arrived: Context = pickle.loads(pickle.dumps(found))
    return arrived


def test_a_session_goes_with_its_node_from_process_to_process_and_to_no_other_node(tmp_path: Path) -> None:
    """Every message finds a new institution, which knows no more than the node's own state tells it."""
    config = config_files.load("smoke")
    names = config.data.names
    place = RunDirectory.at(tmp_path)
    prepare.write(prepare.gather(config.data), place.records(config))
    identities = SimulatedIdentities.fresh(names)
    start = load(config.model, config.lora, config.seed).read()
    institutions = VirtualInstitutions.of(config, place.root, identities)
    plan = secured(make_plan(config, start, cohort=sorted(names)), config, identities.roster())
    aggregator = Aggregator(plan.attempt, identities.roster())
    contexts = {name: context(number, RecordDict()) for number, name in enumerate(names)}
    snapshots: dict[str, Ring] = {}

    def ask(requests: Mapping[str, Request], take: Callable[[str, Any], None]) -> None:
        for name, request in requests.items():
            contexts[name] = moved(contexts[name])
            with pickle.loads(pickle.dumps(institutions))(contexts[name]) as found:
                assert found.name == name
                take(name, found.answer(request))
                snapshots[name] = found.secure.snapshot()[1]

    ask(dict.fromkeys(names, TrainRequest(plan, start)), aggregator.on_keys)
    vectors = {name: vector.copy() for name, vector in snapshots.items()}
    key_list = aggregator.key_list()
    # A node without this session, or with that of another, has no part in it.
    lost = context(0, RecordDict())
    with institutions(lost) as found:
        assert found.answer(key_list) == Refused(ATTEMPT_UNKNOWN, names[0])
    assert session_in(lost)[0] == ""
    ask(dict.fromkeys(names, key_list), aggregator.on_shares)
    ask(aggregator.inboxes(), aggregator.on_masked)
    survivors = aggregator.survivors()
    ask(dict.fromkeys(names, survivors), aggregator.on_consent)
    ask(dict.fromkeys(names, aggregator.consents()), aggregator.on_revealed)
    expected = np.sum(list(vectors.values()), axis=0, dtype=np.uint32) & np.uint32(plan.layout.ring_mask)
    assert np.array_equal(aggregator.unmask(), expected)
    # What is over stays over.
    with institutions(contexts[names[0]]) as found:
        assert found.answer(survivors) == Refused(ATTEMPT_OVER, names[0])


def test_without_secure_aggregation_a_node_keeps_nothing(tmp_path: Path) -> None:
    config = config_files.load("smoke", ["secure_aggregation.enabled=false"])
    state = context(0, RecordDict())
    with VirtualInstitutions.of(config, tmp_path)(state) as found:
        assert found.secure is None
        hello = Hello.of(config, "run", fingerprint(config.model.path))
        assert isinstance(found.answer(hello), Introduction)
    assert not state.state


def test_many_institutions_in_one_process_keep_their_logs_and_no_file_open(tmp_path: Path) -> None:
    names = [f"institution-{number}" for number in range(20)]
    config = Config(data=DataConfig(institutions=named(*names)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for line in ("first", "second"):
        for name in names:
            virtual(config, RunDirectory(tmp_path), name, tmp_path / "data")
            logging.getLogger(f"silotune.client.{name}").warning("%s line", line)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    for name in names:
        lines = (tmp_path / "institutions" / name / "client.log").read_text().splitlines()
        assert [line.split(" WARNING ")[1] for line in lines] == ["first line", "second line"]
