"""What may be made of a trained generator: samples and their evaluation."""
