"""Files to images, grouped by patient. All input is taken to be hostile."""
