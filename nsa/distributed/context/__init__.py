"""Context parallelism: each rank holds some rows of every sequence (``docs/distributed.md``)."""
