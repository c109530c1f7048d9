"""The configuration: what can be said, as small frozen dataclasses by topic.

`common.config_rules` says which values can be meant; `common.config_files` reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

COORDINATOR = "coordinator"
POOLED = "pooled"
"""The folder of the coordinator's records, beside one an institution; so no institution may have this name."""


@dataclass(frozen=True)
class ModelConfig:
    """path: `embedded` (the small Llama shipped with Silotune) or a local directory that transformers can load."""

    path: str = "embedded"


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
class DataConfig:
    """Generated institutions, or a directory of jsonl files as `silotune-sim data` writes it.

    generator: `hospitals` or `banks`; ignored when `directory` is set.
    directory: DIR/<institution>/{train,validation,test}.jsonl and DIR/coordinator/{validation,test}.jsonl.
    institutions: names, in order.
    train_records: one count per institution.
    own_records / central_records: records in each of validation and test, per institution / at the coordinator.
    dirichlet: concentration of each institution's mix of specialties; small means specialised (Hsu et al. 2019).
    seed: of the generator; independent of the run's seed.
    """

    generator: str = "hospitals"
    directory: str = ""
    institutions: list[str] = field(default_factory=list)
    train_records: list[int] = field(default_factory=list)
    own_records: int = 40
    central_records: int = 120
    dirichlet: float = 0.5
    seed: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """Local training; the same in every arm of the comparison unless `compare` says otherwise.

    passes_per_round: passes over the institution's own records in one round; may be a fraction.
    batch_size: records per optimizer step.
    learning_rate: AdamW's peak, reached after `warmup` (share of all rounds), then cosine to `final_rate` x peak.
    optimizer_state: `keep` AdamW's moments at the institution between rounds, or `reset` them.
    proximal: mu of FedProx (Li et al. 2020, equation 2); 0 is off.
    max_tokens: longest record, in tokens; longer ones are cut.
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
    fraction: share of the roster drawn each round. min_cohort: fewest institutions that make a round.
    timeout_s: how long a round waits for an institution.
    """

    rounds: int = 20
    method: str = "fedavg"
    weighting: str = "records"
    weight_unit: int = 16
    fraction: float = 1.0
    min_cohort: int = 2
    timeout_s: float = 600.0
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)


@dataclass(frozen=True)
class QuantiseConfig:
    """The fixed-point form of an update; the sum of such vectors is exact in any order.

    clip: largest absolute value of one element; larger ones are cut. bits: per element. weight_bits: of a weight.
    """

    clip: float = 1.0
    bits: int = 20
    weight_bits: int = 8


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
    that is not finite) or `raise` (a program that fails).
    """

    actors: int = 2
    threads: int = 1
    faults: list[str] = field(default_factory=list)


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
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
