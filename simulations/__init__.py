"""A consortium on one machine: sites, phantoms, comparison arms, report."""
