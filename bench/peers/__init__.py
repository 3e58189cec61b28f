"""Other libraries that score training samples by gradients, and MetaQL, on the same model and data in the same run."""
