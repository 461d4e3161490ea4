"""Settings as they may be shown: addresses of data may hold passwords and signatures."""

from typing import Any

from data_pipeline.stream import without_credentials


def all_without_credentials(value: Any) -> Any:
    """Addresses anywhere within a setting, or a tree of them, lose what may be secret."""
    if isinstance(value, dict):
        return {name: all_without_credentials(item) for name, item in value.items()}
    if isinstance(value, list):
        return [all_without_credentials(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
