"""Tridiagonal: block-tridiagonal K-FAC over a chain of layers; `chain` pairs neighbours, `difference` solves with what
one block leaves of the next."""
