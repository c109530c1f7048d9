"""The configuration: what can be said, as small frozen dataclasses by topic.

`common.config_rules` says which values can be meant; `common.config_files` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

COORDINATOR = "coordinator"
POOLED = "pooled"
"""The folder of the coordinator's records, beside one an institution; so no institution may have this name."""


@dataclass(frozen=True)
class ModelConfig:
    """The base model, and how this machine holds it.

    path: `embedded` (the small Llama shipped with Silotune) or a local directory that transformers can load.
    device: `cpu`, `cuda`, or `auto`: CUDA where there is one.
    dtype: of the base and of its arithmetic, `float32` or `bfloat16`; adapters stay float32. `auto` is bfloat16 on CUDA
    that has it, and float32 elsewhere, so that a run on CPU gives the same numbers on every machine.
    weights: how the frozen base is kept, `full`, or `8bit` or `4bit` through bitsandbytes on CUDA (Dettmers et al.
    2022, 2023).
    digest: what the base model must be, as `silotune-client fingerprint` prints it; empty for whatever lies there.
    """

    path: str = "embedded"
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "full"
    digest: str = ""


@dataclass(frozen=True)
class LoraConfig:
    """The adapter, W + (alpha / rank) B A (Hu et al. 2021, section 4.1).

    target_modules: names of linear layers, or the one name `all-linear`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass(frozen=True)
class ColumnsConfig:
    """What a file calls its columns. `kind`, and whichever of the four forms of record it has, are enough."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    messages: str = "messages"
    kind: str = "kind"


@dataclass(frozen=True)
class FileConfig:
    """A file of records.

    path: jsonl, csv or parquet; empty where records are generated or lie in `data.directory`.
    person: the column that says whose record it is; `-`: there is none, and every record is a person of its own.
    """

    path: str = ""
    person: str = "person"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass(frozen=True)
class InstitutionConfig(FileConfig):
    """An institution of a simulation, and its file where it has one."""

    name: str = ""

    def brief(self) -> str | dict[str, Any]:
        """As a file would say it: what is not the default, and the plain name where nothing else is left."""
        said = {key: value for key, value in asdict(self).items() if value != getattr(InstitutionConfig(), key)}
        if self.columns != ColumnsConfig():
            said["columns"] = {k: v for k, v in asdict(self.columns).items() if v != getattr(ColumnsConfig(), k)}
        else:
            said.pop("columns")
        return self.name if set(said) <= {"name"} else {"name": self.name, **said}


def named(*names: str) -> list[InstitutionConfig]:
    """Institutions without files of their own."""
    return [InstitutionConfig(name=name) for name in names]


@dataclass(frozen=True)
class DataConfig:
    """Where records come from: a generator, a directory as `silotune-sim data` writes it, or a file an institution.

    In a deployment none of the three: records are where the institutions have them, who know them by `name`.

    name: what every institution calls the records that are trained on, in its own data.yaml.
    generator: `hospitals` or `banks`; ignored when `directory` or a path is set.
    directory: DIR/<institution>/{train,validation,test}.jsonl and DIR/coordinator/{validation,test}.jsonl.
    institutions: in order; a plain name stands for one without a file.
    coordinator: its file of records for central evaluation; without one, every institution's file lends some.
    held_out: share of each file's persons in each of validation and test; as much again is lent to a coordinator
    that has no file of its own.
    train_records: one count per institution.
    own_records / central_records: records in each of validation and test, per institution / at the coordinator.
    dirichlet: concentration of each institution's mix of specialties; small means specialised (Hsu et al. 2019).
    seed: of the generator, or of the split of files; independent of the run's seed.
    """

    name: str = "records"
    generator: str = "hospitals"
    directory: str = ""
    institutions: list[InstitutionConfig] = field(default_factory=list)
    coordinator: FileConfig = field(default_factory=FileConfig)
    held_out: float = 0.1
    train_records: list[int] = field(default_factory=list)
    own_records: int = 40
    central_records: int = 120
    dirichlet: float = 0.5
    seed: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The institutions' names, in order."""
        return tuple(institution.name for institution in self.institutions)

    @property
    def has_files(self) -> bool:
        """Whether each institution brings a file of its own."""
        return any(institution.path for institution in self.institutions)


@dataclass(frozen=True)
class TrainConfig:
    """Local training; the same in every arm of the comparison unless `compare` says otherwise.

    passes_per_round: passes over the institution's own records in one round; may be a fraction.
    batch_size: records per optimizer step.
    learning_rate: AdamW's peak, reached after `warmup` (share of all rounds), then cosine to `final_rate` x peak.
    optimizer_state: `keep` AdamW's moments at the institution between rounds, or `reset` them.
    proximal: mu of FedProx (Li et al. 2020, equation 2); 0 is off.
    max_tokens: longest record, in tokens. long: what becomes of a longer one, `truncate` or `chunk`; the second cuts it
    in pieces that share `overlap` tokens, supervised once.
    supervised: `completion` (answers of the assistant, in a chat) or `all` tokens.
    row_tokens: a step's records go through the model in packed rows of at most so many tokens, whose gradients add up;
    it bounds memory, and changes nothing but which weights dropout leaves out.
    checkpointing: forget activations and compute them again in the backward pass (Chen et al. 2016); slower, smaller.
    """

    passes_per_round: float = 1.0
    batch_size: int = 4
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer_state: str = "keep"
    proximal: float = 0.0
    max_tokens: int = 256
    long: str = "truncate"
    overlap: int = 32
    supervised: str = "completion"
    row_tokens: int = 8192
    checkpointing: bool = False


@dataclass(frozen=True)
class ServerOptimizerConfig:
    """How the coordinator steps towards the mean update (Reddi et al. 2021, algorithm 2).

    name: `fedavg`, `fedavgm` or `fedadam`. momentum: FedAvgM's, and FedAdam's beta1.
    """

    name: str = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3


@dataclass(frozen=True)
class FederationConfig:
    """The rounds.

    method: `fedavg` (A and B averaged; McMahan et al. 2017) or `ffa` (only B trained; Sun et al. 2024).
    weighting: `records` or `uniform`. weight_unit: records per unit of weight.
    fraction: share of the roster drawn each round. min_cohort: fewest institutions that make a round, and with secure
    aggregation fewest that a sum may cover.
    timeout_s: how long a round waits for an institution to train.
    gather_s: how long a run waits at its beginning for institutions that are not there, paused, or yet to approve it.
    """

    rounds: int = 20
    method: str = "fedavg"
    weighting: str = "records"
    weight_unit: int = 16
    fraction: float = 1.0
    min_cohort: int = 3
    timeout_s: float = 600.0
    gather_s: float = 600.0
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)


@dataclass(frozen=True)
class SecureAggregationConfig:
    """Whether the coordinator learns sums only (Bonawitz et al. 2017), and what the sums withstand.

    enabled: without it the coordinator can read every update.
    colluders: T, institutions that may collude with the coordinator and still learn no other one's update.
    repeats: how often a round that could not be finished is tried again, with fresh keys, before the run stops.
    timeout_s: how long each phase after training waits for an institution.
    """

    enabled: bool = True
    colluders: int = 1
    repeats: int = 2
    timeout_s: float = 120.0


UNITS: Mapping[str, str] = {
    "record": "record",
    "patient": "patient",
    "institution": "institution",
    "distributed": "record",
}
"""The modes of differential privacy, and the unit of privacy that each one's epsilon speaks of."""

LEAST_CLIP = 1e-12
"""Below it, clipped gradients come near the smallest numbers that float32 has, and rounding may double a norm."""


@dataclass(frozen=True)
class PrivacyConfig:
    """What the published adapter may tell of one unit of privacy (Dwork & Roth 2014), and how that is reached.

    mode: `none`; `record` or `patient` (DP-SGD at each institution, Abadi et al. 2016; a patient is all records of a
    person); `institution` (noise in shares on whole updates, Kairouz et al. 2021); `distributed` (one DP-SGD step a
    round, noise in shares).
    epsilon: what the whole run may cost at `delta`, each institution for itself; the noise follows. 0 where
    noise_multiplier is given: standard deviation of the noise over `clip`; epsilon then follows.
    clip: largest L2 norm of a unit's gradient, or of an institution's update. sampling_rate: probability of each unit
    in each step, the same at every institution. records_per_person: most records of a person that are used.
    """

    mode: str = "none"
    epsilon: float = 0.0
    delta: float = 1e-5
    noise_multiplier: float = 0.0
    clip: float = 1.0
    sampling_rate: float = 0.1
    records_per_person: int = 8

    @property
    def private(self) -> bool:
        """Whether there is any."""
        return self.mode != "none"

    @property
    def shared_noise(self) -> bool:
        """Whether members add their noise in shares, under secure aggregation."""
        return self.mode in ("institution", "distributed")

    @property
    def samples(self) -> bool:
        """Whether training takes units by Poisson sampling and clips each one's gradient."""
        return self.mode in ("record", "patient", "distributed")


@dataclass(frozen=True)
class QuantiseConfig:
    """The fixed-point form of an update; the sum of such vectors is exact in any order.

    clip: largest absolute value of one element; larger ones are cut. bits: per element. weight_bits: of a weight, which
    is at most 2^weight_bits - 1.
    The sum, and every masked vector, takes bits + weight_bits + ceil(log2 institutions) bits an element: with the
    defaults, 3 bytes for 16 institutions.
    """

    clip: float = 1.0
    bits: int = 16
    weight_bits: int = 4


@dataclass(frozen=True)
class EvaluationConfig:
    """Central evaluation on the coordinator's validation records, every `every` rounds.

    exact: kinds of record whose whole greedy answer is compared. patience: evaluations without a better
    perplexity before the run stops early; 0 never stops. institutions: whether each institution also scores the
    adapter it receives on its own validation records; only the sum over all of them reaches the coordinator.
    """

    every: int = 1
    exact: list[str] = field(default_factory=lambda: ["coding"])
    patience: int = 0
    institutions: bool = True


@dataclass(frozen=True)
class ArmConfig:
    """Batch size and learning rate of a reference arm, as `silotune-sim tune` found them."""

    batch_size: int = 4
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class CompareConfig:
    """The honest comparison: base, local-only, federated, pooled at equal passes over each record."""

    enabled: bool = True
    local: ArmConfig = field(default_factory=ArmConfig)
    pooled: ArmConfig = field(default_factory=ArmConfig)


@dataclass(frozen=True)
class TuneConfig:
    """The grid that `silotune-sim tune` searches, the same for every arm."""

    batch_sizes: list[int] = field(default_factory=lambda: [4, 8])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3])


@dataclass(frozen=True)
class SimulationConfig:
    """actors: processes that play the institutions. threads: CPU threads of each.

    faults: INSTITUTION:FAULT, institutions that misbehave, to see what a run makes of it; a fault is `nan` (an update
    that is not finite), `raise` (a program that fails) or `silent` (under secure aggregation, no word after its keys).
    """

    actors: int = 2
    threads: int = 1
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run's curves go besides metrics.jsonl; only what the coordinator sees.

    tensorboard: event files in the run directory. mlflow: a tracking URI; wandb: a project name; empty is off. Both
    need their own package, and send to whatever server they are set up for.
    """

    tensorboard: bool = True
    mlflow: str = ""
    wandb: str = ""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; written resolved beside its results."""

    name: str = "unnamed"
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    secure_aggregation: SecureAggregationConfig = field(default_factory=SecureAggregationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
