"""The comparison: what makes arms comparable, and the one number drawn from it."""

import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import Adapter
from common.config import POOLED, ArmConfig, PrivacyConfig, TrackingConfig
from common.config_files import load
from common.errors import RunStopped
from common.models import save_adapter
from common.privacy.accounting import Event
from common.privacy.mechanism import round_event
from common.records import read_jsonl
from server.coordinator import Bench
from server.rounds import Progress
from simulations.compare import arm_config, gap_closed, run_arm, score_arm, write_pooled
from simulations.generate import federation as generator
from simulations.layout import RunDirectory

CONFIG = load("smoke")


def test_no_curve_of_an_arm_leaves_the_machine() -> None:
    tracked = replace(CONFIG, tracking=TrackingConfig(mlflow="https://example.org", wandb="project"))
    assert arm_config(tracked, "riverside").tracking == TrackingConfig()


def test_gap_closed_by_hand() -> None:
    assert gap_closed(8.0, 4.0, 2.0) == pytest.approx(0.5)
    assert gap_closed(8.0, 2.0, 2.0) == pytest.approx(1.0)
    assert gap_closed(8.0, 16.0, 2.0) == pytest.approx(-0.5)
    assert gap_closed(8.0, 4.0, 8.0) is None
    assert gap_closed(4.0, 2.0, 8.0) is None


@given(st.floats(1.1, 1e3), st.floats(1.1, 1e3), st.floats(1.1, 1e3), st.floats(0.5, 2.0))
def test_gap_closed_does_not_depend_on_the_unit_of_a_token(
    local: float, federated: float, pooled: float, power: float
) -> None:
    """Perplexity per token or per word differ by a power; the share of the gap is the same."""
    before, after = gap_closed(local, federated, pooled), gap_closed(local**power, federated**power, pooled**power)
    if before is None or after is None or abs(math.log(local / pooled)) < 1e-3:
        return
    assert after == pytest.approx(before, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("arm", [POOLED, "riverside"])
def test_an_arm_differs_from_the_federation_in_who_takes_part_and_in_what_was_tuned(arm: str) -> None:
    tuned = replace(CONFIG, compare=replace(CONFIG.compare, local=ArmConfig(2, 3e-3), pooled=ArmConfig(16, 5e-4)))
    mine = arm_config(tuned, arm)
    expected = tuned.compare.pooled if arm == POOLED else tuned.compare.local
    assert (mine.train.batch_size, mine.train.learning_rate) == (expected.batch_size, expected.learning_rate)
    assert replace(mine.train, batch_size=4, learning_rate=1e-3) == replace(
        tuned.train, batch_size=4, learning_rate=1e-3
    )
    assert mine.data.names == (arm,)
    assert not mine.secure_aggregation.enabled  # a federation of one has nobody to hide from
    for same in ("lora", "model", "quantise", "seed"):
        assert getattr(mine, same) == getattr(tuned, same)
    assert (mine.evaluation.every, mine.evaluation.patience) == (tuned.evaluation.every, tuned.evaluation.patience)
    assert (mine.federation.rounds, mine.federation.method) == (tuned.federation.rounds, tuned.federation.method)


@pytest.mark.parametrize(
    ("mode", "arm_mode"),
    [
        ("record", "record"),
        ("patient", "patient"),
        ("distributed", "record"),
        ("institution", "none"),
        ("none", "none"),
    ],
)
def test_an_arm_has_the_noise_of_the_federation_where_it_can(mode: str, arm_mode: str) -> None:
    said = PrivacyConfig(mode, noise_multiplier=3.0, delta=1e-3, sampling_rate=0.25)
    privacy = said if mode != "none" else PrivacyConfig()
    asked = replace(CONFIG, privacy=privacy, train=replace(CONFIG.train, passes_per_round=2.0))
    mine = arm_config(asked, "riverside")
    assert mine.privacy == (replace(privacy, mode=arm_mode) if arm_mode != "none" else PrivacyConfig())
    assert mine.train.passes_per_round == (0.25 if mode == "distributed" else 2.0)
    told = round_event(mine.privacy, mine.quantise, mine.train.passes_per_round, 2, 100, None)
    if mode == "distributed":  # the same lots, each seen in one step
        assert told == Event("gaussian", 3.0, 0.25, 1)


@pytest.mark.parametrize("mode", ["distributed", "institution"])
def test_an_arm_trains_where_the_federation_has_noise_in_shares(tmp_path: Path, mode: str) -> None:
    directory = RunDirectory.at(tmp_path)
    generator.write(generator.generate(CONFIG.data), directory.records(CONFIG))
    privacy = PrivacyConfig(mode, noise_multiplier=1.0, sampling_rate=0.5)
    progress = run_arm(replace(CONFIG, privacy=privacy), directory, "riverside")
    assert [record.contributors for record in progress.history] == [1, 1]
    assert progress.adapter.digest() != progress.best.digest() or progress.best_round == 2
    assert RunDirectory.at(directory.arms / "riverside").ledger("riverside").exists() == (mode == "distributed")


def test_pooled_holds_everybodys_training_records_and_no_test_record(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    federation = generator.generate(CONFIG.data)
    generator.write(federation, directory.records(CONFIG))
    write_pooled(CONFIG, directory)
    pooled = read_jsonl(directory.pooled_records / POOLED / "train.jsonl")
    assert sorted(map(repr, pooled)) == sorted(
        repr(record) for splits in federation.institutions.values() for record in splits.train
    )
    held_out = {record for splits in federation.institutions.values() for record in (*splits.validation, *splits.test)}
    assert not held_out & set(pooled)


@pytest.mark.parametrize("worse", ["published", "last"])
def test_alone_at_home_counts_the_round_that_its_own_validation_prefers(worse: str, tmp_path: Path) -> None:
    """On everybody's test it is the published round, whichever is better at home."""
    directory = RunDirectory.at(tmp_path)
    generator.write(generator.generate(CONFIG.data), directory.records(CONFIG))
    bench = replace(Bench.of(CONFIG), exact=())
    noisy = Adapter({key: factor + np.float32(0.2) for key, factor in bench.start.factors.items()})
    published, last = (noisy, bench.start) if worse == "published" else (bench.start, noisy)
    save_adapter(published, CONFIG.lora, "embedded", directory.arms / "lakeside" / "adapter")
    found = score_arm(CONFIG, directory, bench, "lakeside", Progress(last, published))
    own = bench.read(directory.records(CONFIG) / "lakeside" / "test.jsonl")
    assert found.own["lakeside"] == bench.scores(bench.start, own) != bench.scores(noisy, own)
    assert found.everyone == bench.scores(published, bench.read(directory.central(CONFIG, "test")))
    stopped = score_arm(CONFIG, directory, bench, "lakeside", None)
    assert stopped.own["lakeside"] == bench.scores(published, own)


def test_the_pooled_arm_has_no_home(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    generator.write(generator.generate(CONFIG.data), directory.records(CONFIG))
    bench = replace(Bench.of(CONFIG), exact=())
    assert score_arm(CONFIG, directory, bench, POOLED, Progress(bench.start, bench.start)).own == {}


def test_no_worker_outlives_a_killed_command() -> None:
    code = (
        "from simulations.processes import process_pool\nimport os, time\n"
        "if __name__ == '__main__':\n"
        "    with process_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 60).result()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "command.py"
        script.write_text(code)
        command = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert command.stdout is not None
        worker = int(command.stdout.readline())
        command.kill()
        command.wait()
        end = time.monotonic() + 10
        while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
            assert time.monotonic() < end, "the worker lives on"
            time.sleep(0.05)


def test_an_arm_that_diverges_stops_with_words(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path)
    generator.write(generator.generate(CONFIG.data), directory.records(CONFIG))
    wild = replace(CONFIG, compare=replace(CONFIG.compare, local=ArmConfig(4, 1e30)))
    with pytest.raises(RunStopped, match="void"):
        run_arm(wild, directory, "riverside")
