"""An index of all documents that were ever deduplicated, which later dumps are compared with."""

from data_pipeline.dedup.index.add import (
    IndexReport,
    checked_settings,
    deduplicate_with_index,
    deduplicate_within,
)
from data_pipeline.dedup.index.removal import RemovalReport, remove_documents
from data_pipeline.dedup.index.settings import Settings, parse_memory
from data_pipeline.dedup.index.tables import export_clusters

__all__ = [
    "IndexReport",
    "RemovalReport",
    "Settings",
    "checked_settings",
    "deduplicate_with_index",
    "deduplicate_within",
    "export_clusters",
    "parse_memory",
    "remove_documents",
]
