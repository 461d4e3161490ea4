"""Pages from web archives: WARC and WET files, compressed or not, whole or damaged."""

from data_pipeline.crawl.archive import Archive, Page, Reject, find_archives

__all__ = ["Archive", "Page", "Reject", "find_archives"]
