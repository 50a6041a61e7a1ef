"""Context parallelism: each rank has some rows of every sequence (docs/context_parallel.md)."""
