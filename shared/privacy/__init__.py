"""Events, accounting, ledger, budget: flat, each readable alone."""
