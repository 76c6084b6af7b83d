"""LightningDataModules and file readers."""
