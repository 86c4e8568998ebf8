"""One hospital: its data, its GAN, its privacy ledger, its keys."""
