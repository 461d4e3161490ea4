"""What is loaded and compiled before a page's seconds are counted."""

from data_pipeline.crawl import Page
from data_pipeline.extract.text import ExtractError, Mode, extract_text

# A page that the rules of the shipped recipes pass.
GOOD_PAGE = (
    "<html><body><h1>The mill</h1><p>The old mill stands below the village, where the river is "
    "slow and wide. Nobody has worked in it since the war, and yet its wheel turns whenever "
    "there is enough rain.</p><p>Children come here after school to fish, or to throw stones "
    "at the windows that are left. Last summer a family from the city bought the place with "
    "all of its land. They want to open a small museum, and they have asked the council for "
    "help with the roof. Most people would be glad to see that happen.</p></body></html>"
)


def get_ready_to_extract(mode: Mode) -> None:
    """Load what extraction takes, once for all processes that are copies of this one.

    Raises:
        RuntimeError: a page that is known to be good cannot be read, so that no other will be.
    """
    page = Page("", "", "", 0, 200, "text/html", "utf-8", GOOD_PAGE.encode())
    try:
        extract_text(page, mode)
    except ExtractError as error:
        raise RuntimeError(f"the parser fails on a good page: {error}") from error
