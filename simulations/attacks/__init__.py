"""Attacks that check what the rest of the project promises: each tries to learn what it should not, and says how far it
came.
"""
