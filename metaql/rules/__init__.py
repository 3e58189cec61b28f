"""The rewrites, one a file; their order stands in ``metaql.optimizer``."""
