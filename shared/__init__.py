"""What every party must agree on. Imports none of the other rooms, and no torch."""
