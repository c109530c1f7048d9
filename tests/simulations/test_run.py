"""The main job on Flower's real engine: results, kills, faults, and what the disk says."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common import config_files
from common.evaluation import evaluate
from common.models import load_adapter
from server import checkpoints
from server.coordinator import Bench, Observer, coordinate
from server.summary import PHASES
from simulations.institutions import virtual
from simulations.layout import RunDirectory
from simulations.members import InProcessMembers

COMMAND = [str(Path(sys.executable).with_name("silotune-sim"))]
ROUNDS = 4
PLAIN = [f"federation.rounds={ROUNDS}", "compare.enabled=false"]


def silotune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nothing disturbs, with the comparison."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = silotune("run", "smoke", f"federation.rounds={ROUNDS}", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_the_summary_is_what_the_json_says_and_holds_every_promised_number(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    assert json.loads((out / "summary.json").read_text()) == summary
    for arm in ("base", "local_best", "federated", "pooled"):
        assert summary["everyone"][arm]["perplexity"] > 1
        assert 0 <= summary["everyone"][arm]["accuracy"] <= 1
    for name in summary["institutions"]:
        for arm in ("local", "federated"):
            assert summary["own"][name][arm]["perplexity"] > 1
    assert set(summary["seconds"]) >= {"train", "secure_aggregation", "aggregate", "evaluate", "total"}
    spent = {phase: summary["seconds"][phase] for phase in PHASES}
    share = spent["secure_aggregation"] / sum(spent.values())
    assert 0 < summary["secure_aggregation_share"] < 1
    assert summary["secure_aggregation_share"] == pytest.approx(share, abs=0.01)  # seconds are rounded
    assert summary["privacy"]["secure_aggregation"] is True
    terms = summary["privacy"]["terms"]
    assert (terms["cohort"], terms["threshold"], terms["dropouts"]) == (3, 3, 0)
    assert summary["bytes_per_client_round"]["up"] >= summary["parameters"]["adapter"] * terms["ring_bits"] / 8
    local, federated, pooled = (
        math.log(summary["everyone"][arm]["perplexity"]) for arm in ("local_best", "federated", "pooled")
    )
    if local - pooled > 1e-9:
        assert summary["gap_closed"] == pytest.approx((local - federated) / (local - pooled))


def test_training_helps(whole: tuple[Path, dict[str, Any]]) -> None:
    everyone = whole[1]["everyone"]
    assert everyone["federated"]["perplexity"] < everyone["base"]["perplexity"]


def test_the_run_directory_is_complete(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == list(range(1, ROUNDS + 1))
    page = (out / "report.html").read_text()
    assert all(name in page for name in summary["institutions"])
    assert str(out) not in page
    assert config_files.load(str(out / "config.yaml")).federation.rounds == ROUNDS


def test_an_attack_on_a_finished_run_stands_in_its_report(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    done = silotune("attack", "coordinator", "smoke", f"federation.rounds={ROUNDS}", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert json.loads((out / "attacks" / "coordinator.json").read_text()) == said
    assert (said["attack"], said["verdict"]) == ("coordinator", "held")
    assert {"update in the clear", "masked vector", "sum of the cohort"} <= {m["of"] for m in said["measures"]}
    before, after = ((place / "report.html").read_text() for place in (whole[0], out))
    assert "masked vector" in after
    assert "masked vector" not in before
    assert weights(out) == weights(whole[0])
    other = silotune("attack", "coordinator", "smoke", "--out", out)
    assert other.returncode == 2
    assert "belongs to another configuration" in other.stderr


def test_stock_peft_loads_the_adapter_and_gives_the_reported_perplexity(whole: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from common.base_model import model_directory

    out, summary = whole
    base = AutoModelForCausalLM.from_pretrained(model_directory("embedded"))
    stock = PeftModel.from_pretrained(base, out / "adapter").eval()
    bench = Bench.of(config_files.load(str(out / "config.yaml")))
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for example in bench.read(out / "data" / "coordinator" / "test.jsonl"):
            ids = torch.tensor([example.ids])
            logits = stock(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            loss += float(losses[example.prompt_tokens - 1 :].sum())
            tokens += example.supervised
    # One document at a time against packed rows: the same numbers up to float32 rounding.
    assert math.exp(loss / tokens) == pytest.approx(summary["everyone"]["federated"]["perplexity"], rel=1e-4)


def test_one_process_without_masks_gives_the_same_adapter_as_the_engine_with_them(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import torch

    out, _ = whole
    config = config_files.load(str(out / "config.yaml"), ["secure_aggregation.enabled=false"])
    (tmp_path / "data").symlink_to(out / "data")
    place = RunDirectory(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.simulation.threads)
    try:
        members = InProcessMembers([virtual(config, place, name, place.records(config)) for name in config.data.names])
        coordinate(config, tmp_path, tmp_path / "data" / "coordinator" / "validation.jsonl", members, Observer())
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path) == weights(out)


def test_a_killed_run_goes_on_and_ends_with_the_same_adapter(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "run", "smoke", *PLAIN, "simulation.actors=1", "--out", str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _wait_for_a_round(out, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done_before = len((out / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done_before < ROUNDS
    kept = checkpoints.latest(out / "checkpoints", config_files.digest(config_files.load(str(out / "config.yaml"))))
    assert kept is not None
    begun = json.loads((out / "attempts.json").read_text())[0]["number"]
    assert begun in (kept.round, kept.round + 1)  # the round under way may have had its attempt
    resumed = silotune("run", "--resume", out, "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["rounds_run"] == ROUNDS
    assert summary["privacy"]["secure_aggregation"] is True
    # No number is used twice; what institutions marked before the kill agrees.
    assert json.loads((out / "attempts.json").read_text())[0]["number"] == begun + ROUNDS - kept.round
    marks = [json.loads(file.read_text()) for file in out.glob("institutions/*/*/marks.json")]
    assert [(found["attempt"], len(found["sums"])) for found in marks] == [(begun + ROUNDS - kept.round, ROUNDS)] * 3
    # Another number of actors, a kill, and the same bytes.
    assert weights(out) == weights(whole[0])


def test_an_interrupt_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "run", "smoke", "federation.rounds=1000", "compare.enabled=false", "--out", str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_a_round(out, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {out}" in said
    assert "Traceback" not in said


def test_a_void_update_and_a_crash_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = silotune(
        "run", "smoke", *PLAIN, "federation.rounds=1", "data.institutions=[riverside,northgate,lakeside,summit]",
        "data.train_records=[16,16,16,16]", "simulation.faults=[riverside:nan,northgate:raise]",
        "--out", out, "--json",
    )  # fmt: skip
    assert "of 4 institutions a round up to 1 may fall silent" in " ".join(done.stderr.split())
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["void_updates"] == 1
    assert summary["refused"] == {}
    assert summary["absences"] == {"northgate": {"internal_error": 1}}
    assert "internal_error" in (out / "report.html").read_text()
    assert "4711" not in done.stdout + done.stderr
    assert "4711" in (out / "institutions" / "northgate" / "client.log").read_text()


def test_an_institution_that_falls_silent_under_secure_aggregation_is_counted_and_the_others_sum_is_used(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    done = silotune(
        "run", "smoke", *PLAIN, "federation.rounds=2", "data.institutions=[riverside,northgate,lakeside,summit]",
        "data.train_records=[16,16,16,16]", "simulation.faults=[northgate:silent]", "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["absences"] == {"northgate": {"timed_out": 2}}
    assert summary["privacy"]["terms"]["dropouts"] == 1
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["contributors"], record["attempts"]) for record in rounds] == [(3, 1), (3, 1)]
    assert "northgate" not in json.loads((out / "attempts.json").read_text())[0]["survivors"]


def test_when_everybody_fails_the_run_stops_and_says_why(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = silotune(
        "run", "smoke", *PLAIN, "simulation.faults=[riverside:raise,northgate:raise,lakeside:raise]", "--out", out
    )
    assert done.returncode == 6
    assert "internal_error" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_records_written_by_data_can_be_used_as_they_are(tmp_path: Path) -> None:
    records = tmp_path / "data"
    assert silotune("data", "smoke", "--out", records).returncode == 0
    again = ["run", "smoke", *PLAIN, "federation.rounds=1", f"data.directory={records}", "--json"]
    done = silotune(*again, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "data").exists()
    # A mistake is told before anything is trained, by file and line.
    (records / "northgate" / "train.jsonl").write_text('{"prompt": "no completion", "person": "p"}\n')
    done = silotune(*again, "--out", tmp_path / "another")
    assert done.returncode == 3
    assert "northgate/train.jsonl:1:" in "".join(done.stderr.split())
    assert not (tmp_path / "another" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "smoke", "model.path=/nowhere", "--out", "OUT"], 4, "/nowhere"),
        (["run", "smoke", "data.directory=/nowhere", "--out", "OUT"], 3, "/nowhere"),
        (["run", "smoke", "--out", "/proc/silotune"], 5, "/proc/silotune"),
        (["run", "--resume", "OUT"], 2, "config.yaml"),
    ],
)
def test_bad_input_is_refused_in_words(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = silotune(*(argument.replace("OUT", str(tmp_path / "run")) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert says in "".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def _wait_for_a_round(out: Path, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, "the run ended before its first round"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_evaluation_of_the_published_adapter_is_that_of_the_best_round(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    config = config_files.load(str(out / "config.yaml"))
    bench = Bench.of(config)
    bench.model.write(load_adapter(out / "adapter"))
    scores = evaluate(bench.model, bench.read(out / "data" / "coordinator" / "validation.jsonl"))
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = rounds[summary["best_round"] - 1]["validation"]["perplexity"]
    assert best == min(record["validation"]["perplexity"] for record in rounds)
    assert scores.perplexity == pytest.approx(best, rel=1e-6)
