"""Measures what a template does to a model's answers; run by `strongroom eval` against a served endpoint."""
