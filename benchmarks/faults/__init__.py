"""Faults and bad input, measured: one module a group of figures, found by its NAME and its `measure`.

    NAME = "ledger"                                  what the command line calls the group
    def measure(size: float) -> list[Figure]         size 1 is the full measurement; tests run 0.001 of it
    NOTES = ["..."]                                  optional: what a reader of the figures must know
"""
