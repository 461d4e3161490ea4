"""The text of a page, as a reader of the page would copy it."""

from data_pipeline.extract.archives import PAGES, extract_archives
from data_pipeline.extract.isolation import (
    CRASHED,
    MAX_SECONDS,
    TOO_SLOW,
    call_in_time,
    call_in_time_apart,
)
from data_pipeline.extract.ready import GOOD_PAGE, get_ready_to_extract
from data_pipeline.extract.text import MODES, ExtractError, Mode, extract_text

__all__ = [
    "CRASHED",
    "GOOD_PAGE",
    "MAX_SECONDS",
    "MODES",
    "PAGES",
    "TOO_SLOW",
    "ExtractError",
    "Mode",
    "call_in_time",
    "call_in_time_apart",
    "extract_archives",
    "extract_text",
    "get_ready_to_extract",
]
