"""What the suites of `farspan eval` have in common."""

from launch.suite import names_in


def test_what_is_named_twice_is_asked_once() -> None:
    assert names_in("needle, overwrite,needle,") == ("needle", "overwrite")
    assert names_in(" ") == ()
