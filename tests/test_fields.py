"""What people write into tags, read one way everywhere."""

from __future__ import annotations

import pytest

from blocks.fields import tagged_owner

pytestmark = pytest.mark.no_server


@pytest.mark.parametrize(
    ("tags", "owner"),
    [
        ([], None),
        (["nightly", "owner:weather-desk"], "weather-desk"),
        (["owner:Flight Ops", "owner:later"], "Flight Ops"),
        (["of-owner:nobody", "owner"], None),
        (["owner:team:lead"], "team:lead"),
    ],
)
def test_the_first_tag_of_an_owner_counts(tags: list[str], owner: str | None) -> None:
    """Whatever has tags, an owner is the first that is named in full."""
    assert tagged_owner(tags) == owner
