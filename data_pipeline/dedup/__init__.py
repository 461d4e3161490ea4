"""Exact and near-duplicate removal with MinHash-LSH."""

from data_pipeline.dedup.run import DedupReport, check_memory, deduplicate

__all__ = ["DedupReport", "check_memory", "deduplicate"]
