"""The coordinator: adds ciphertexts that it cannot read. Imports shared only; no torch, no secret key, ever."""
