"""Faults and bad input, measured. A group of figures is a module that has a NAME and can `measure`; nothing lists them.

    NAME = "ledger"                                  what the command line calls the group
    def measure(size: float) -> list[Figure]         size 1 is the full measurement; tests run 0.001 of it
    NOTES = ["..."]                                  optional: what a reader of the figures must know

Figures are named after the table of thresholds in the security design: R1_lost, R1_kills, ...
"""
