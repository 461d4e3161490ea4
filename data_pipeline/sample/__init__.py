"""A sample crawl made on the spot from the documentation that every Python installation has."""

from data_pipeline.sample.crawl import SampleReport, make_sample_crawl

__all__ = ["SampleReport", "make_sample_crawl"]
