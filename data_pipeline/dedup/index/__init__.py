"""An index of all documents that were ever deduplicated, which later dumps are compared with."""

from data_pipeline.dedup.index.add import IndexReport, deduplicate_with_index, deduplicate_within
from data_pipeline.dedup.index.limits import parse_memory
from data_pipeline.dedup.index.removal import RemovalReport, remove_documents
from data_pipeline.dedup.index.tables import export_clusters
from data_pipeline.dedup.settings import Settings, checked_settings

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
