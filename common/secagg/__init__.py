"""Secure aggregation: the coordinator learns the sum of a round's vectors, and nothing else of any of them.

Bonawitz et al. (2017, CCS), the variant for a malicious server, on a complete graph. Two state machines without
sockets, files or clock: `participant.Participant` and `aggregator.Aggregator`, one method for each incoming message.
docs/protocol.md has the messages, docs/threat-model.md the guarantee.
"""
