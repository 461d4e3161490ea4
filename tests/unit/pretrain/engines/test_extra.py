"""Whether an engine's packages are installed, and were tested."""

import pytest

from pretrain.engines import extra
from pretrain.engines.extra import check_extra
from pretrain.errors import UserError


def test_a_missing_package_is_told_with_what_to_install() -> None:
    with pytest.raises(
        UserError, match=r"^no-such-engine is not installed; pip install 'farspan\[engine\]'"
    ):
        check_extra("engine", {"no-such-engine": "1.0"})


@pytest.mark.parametrize("wanted", ["1.0", None])
def test_a_tested_version_is_not_worth_a_word(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(extra, "version", lambda _: "1.0")
    check_extra("engine", {"some-engine": wanted})
    assert not recwarn


def test_an_untested_version_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "version", lambda _: "2.0")
    with pytest.warns(UserWarning, match=r"some-engine 2\.0 was not tested, 1\.0 was"):
        check_extra("engine", {"some-engine": "1.0"})
