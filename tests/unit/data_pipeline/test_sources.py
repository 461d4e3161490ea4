import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import Source, without_credentials


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://joe:secret@host:8080/a/pages?sig=secret#secret", "https://host:8080/a/pages"),
        ("https://joe:secret@host?sig=a@b/c", "https://host"),
        ("s3://bucket/pages", "s3://bucket/pages"),
        ("data/what?#me@here", "data/what?#me@here"),
    ],
)
def test_only_secrets_are_left_out_of_an_address(address: str, told: str) -> None:
    assert without_credentials(address) == told


@pytest.mark.parametrize(
    "path", ["https://joe:secret@host/pages?sig=secret", "https://joe:secret@host"]
)
def test_no_secret_of_an_address_becomes_a_name_or_part_of_an_error(path: str) -> None:
    assert Source(path).name in {"pages", "host"}
    with pytest.raises(DataError) as told:
        Source(path, weight=-1.0)
    assert "secret" not in str(told.value)
