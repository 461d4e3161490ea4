"""Pages from web archives: WARC and WET files, compressed or not, whole or damaged."""

from data_pipeline.crawl.archive import Archive, Page, Reject, read_document
from data_pipeline.crawl.common_crawl import CRAWL_URL
from data_pipeline.crawl.inputs import Source, find_archives, identify

__all__ = [
    "CRAWL_URL",
    "Archive",
    "Page",
    "Reject",
    "Source",
    "find_archives",
    "identify",
    "read_document",
]
