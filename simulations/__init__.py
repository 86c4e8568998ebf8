"""A consortium on one machine: sites, phantoms, comparison arms, report."""

from pathlib import Path

DEFAULT_STUDY = Path(__file__).with_name("study.toml")
"""The commented example: what `fedmedgan study new` writes and `fedmedgan simulate` runs."""
