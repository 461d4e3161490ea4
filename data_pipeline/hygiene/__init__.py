"""What nobody wants to train on: personal data, listed sites and words, evaluation texts."""

from data_pipeline.hygiene.blocklist import UrlBlocklist, WordBlocklist
from data_pipeline.hygiene.decontamination import Decontamination
from data_pipeline.hygiene.privacy import Privacy

__all__ = ["Decontamination", "Privacy", "UrlBlocklist", "WordBlocklist"]
