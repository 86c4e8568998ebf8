"""Auditing: whoever does not trust a hospital's word checks its ledger, its noise and its generator."""
