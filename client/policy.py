"""What an institution agreed to, and what it therefore accepts of a plan. The coordinator cannot change it."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import Config, QuantiseConfig
from common.errors import ConfigError, Refusal
from common.messages import METHOD_UNKNOWN, Plan, SecurePlan
from common.secagg import reasons
from common.secagg.attempt import Attempt
from common.secagg.identity import Roster
from common.secagg.terms import Terms


@dataclass(frozen=True)
class Policy:
    """An institution's terms for secure aggregation.

    roster: names and keys, which did not come from the coordinator. colluders: T, members that may be on the
    coordinator's side. smallest: fewest members in a sum. methods, weight_unit, quantise: how an update may become a
    vector. required: whether an update leaves under masks only.
    """

    roster: Roster
    colluders: int
    smallest: int
    methods: tuple[str, ...]
    weight_unit: int
    quantise: QuantiseConfig
    required: bool = True

    @classmethod
    def of(cls, config: Config, roster: Roster) -> Policy:
        """The terms that a configuration states."""
        return cls(
            roster=roster,
            colluders=config.secure_aggregation.colluders,
            smallest=config.federation.min_cohort,
            methods=(config.federation.method,),
            weight_unit=config.federation.weight_unit,
            quantise=config.quantise,
        )

    def accept(self, plan: Plan, name: str, public: bytes, parameters: int) -> Attempt:
        """The attempt that a plan announces to the member `name` with the signing key `public`.

        parameters: length of the update, as this member computes it from the adapter that came.

        Raises Refusal with the code of what differs from these terms: secure_aggregation_required, roster_differs,
        cohort_unknown, cohort_too_small, terms_differ, method_unknown, settings_differ or vector_differs.
        """
        secure = plan.secure
        if secure is None:
            raise Refusal(reasons.SECURE_AGGREGATION_REQUIRED, "the plan asks for an update in the clear")
        self.accept_roster(secure.roster, name, public)
        in_order = list(plan.cohort) == sorted(set(plan.cohort))
        if name not in plan.cohort or not set(plan.cohort) <= set(self.roster.keys) or not in_order:
            raise Refusal(reasons.COHORT_UNKNOWN, f"the cohort is {plan.cohort}")
        if len(plan.cohort) < max(self.smallest, secure.terms.survivors):
            raise Refusal(reasons.COHORT_TOO_SMALL, f"a cohort of {len(plan.cohort)}, agreed: {self.smallest}")
        self._check_terms(secure, len(plan.cohort))
        self._check_settings(plan)
        try:
            attempt = plan.attempt
        except ConfigError as error:
            raise Refusal(reasons.VECTOR_DIFFERS, str(error)) from error
        layout = attempt.layout
        if (plan.parameters, secure.length, secure.ring_bits) != (parameters, layout.length, layout.ring_bits):
            raise Refusal(
                reasons.VECTOR_DIFFERS,
                f"{plan.parameters} parameters in {secure.length} elements of {secure.ring_bits} bits, expected "
                f"{parameters} in {layout.length} of {layout.ring_bits}",
            )
        return attempt

    def accept_roster(self, named: str, name: str, public: bytes) -> None:
        """Raises Refusal(roster_differs) unless that is this roster's digest, and it has that key for this member."""
        if named != self.roster.digest() or self.roster.keys.get(name) != public:
            raise Refusal(reasons.ROSTER_DIFFERS, "the coordinator holds another roster, or this one has another key")

    def _check_terms(self, secure: SecurePlan, invited: int) -> None:
        members = secure.terms.members
        try:
            agreed = Terms.of(members, self.colluders, self.smallest)
        except ConfigError as error:
            raise Refusal(reasons.TERMS_DIFFER, str(error)) from error
        if secure.terms != agreed or not invited <= members <= len(self.roster.keys):
            raise Refusal(reasons.TERMS_DIFFER, f"{secure.terms} for a cohort of {invited}, agreed: {agreed}")

    def _check_settings(self, plan: Plan) -> None:
        settings = plan.settings
        if settings.method not in self.methods:
            raise Refusal(METHOD_UNKNOWN, f"method {settings.method!r}, agreed: {', '.join(self.methods)}")
        if (settings.quantise, settings.weight_unit) != (self.quantise, self.weight_unit):
            raise Refusal(
                reasons.SETTINGS_DIFFER,
                f"{settings.quantise} with a weight unit of {settings.weight_unit}, agreed: {self.quantise} with "
                f"{self.weight_unit}",
            )
