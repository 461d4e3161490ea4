"""Published quality heuristics: each judges a text and may edit it."""

from data_pipeline.quality.c4 import C4
from data_pipeline.quality.fineweb import FineWeb
from data_pipeline.quality.gopher import GopherQuality, GopherRepetition
from data_pipeline.quality.gpt3 import GPT3
from data_pipeline.quality.text import Text
from data_pipeline.quality.verdict import Verdict

__all__ = ["C4", "GPT3", "FineWeb", "GopherQuality", "GopherRepetition", "Text", "Verdict"]
