"""Numbers about attention rows: kernels on arrays, their labelled form, and the audit of published tables."""
