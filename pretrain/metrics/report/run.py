"""A run as the report sees it: what it logged, its settings, and what is known of its data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from pretrain.config import Config, parse_config
from pretrain.errors import UserError
from pretrain.metrics.history import History
from pretrain.run_dir import RunDirectory


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        name: unique on its page.
        data_manifests: of the data the run trains on. `unigram_entropy` (nats per token) and
            `funnel`, a list of `{"stage", "reason", "documents"}`, are shown where there.
    """

    name: str
    directory: RunDirectory
    history: History
    data_manifests: Sequence[Mapping[str, Any]] = field(default=())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration as it was written, empty if there is none."""
        if not self.directory.config.exists():
            return {}
        return yaml.safe_load(self.directory.config.read_text()) or {}

    @cached_property
    def config(self) -> Config | None:
        """None if there is none, or if it is that of another version."""
        try:
            return parse_config(self.settings) if self.settings else None
        except UserError:
            return None

    @cached_property
    def funnels(self) -> list[dict[str, Any]]:
        """Of the data's sources, those that know what each step has dropped, with examples."""
        path = self.directory.funnel
        return (read_json(path.read_text()) or []) if path.exists() else []

    @cached_property
    def unigram_entropy(self) -> float | None:
        """That of the data, if it is a single source: those of several do not add up."""
        if len(self.data_manifests) != 1:
            return None
        return self.data_manifests[0].get("unigram_entropy")

    @cached_property
    def steps_planned(self) -> int | None:
        return self.settings.get("train", {}).get("steps")


def read_json(text: str) -> Any:
    """None for a file that is being written, or was left half-written."""
    try:
        return json.loads(text)
    except ValueError:
        return None
