"""Canonical rows: the bundled exam, named data sets, and mixtures of them."""
