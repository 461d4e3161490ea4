"""The text of a page, as a reader of the page would copy it."""

from data_pipeline.extract.archives import PAGES, extract_archives
from data_pipeline.extract.text import MODES, ExtractError, Mode, extract_text

__all__ = ["MODES", "PAGES", "ExtractError", "Mode", "extract_archives", "extract_text"]
