"""Attacks on what a run promises: each tries to learn what it should not, and says how far it came."""
