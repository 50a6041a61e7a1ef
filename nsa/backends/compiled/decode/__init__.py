"""One step of decode: a few new queries of every sequence, over its cache."""
