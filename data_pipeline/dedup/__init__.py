"""Exact and near-duplicate removal with MinHash-LSH."""

from data_pipeline.dedup.run import DedupReport, deduplicate

__all__ = ["DedupReport", "deduplicate"]
