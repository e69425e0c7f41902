"""`[tier]`: which URLs name a store, what goes together, and what of it reaches the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snapd.config import load
from snapd.config_tiers import TierConfig, check_tier, store_of, store_options
from snapd.errors import ConfigError
from snapd.store.directory import DirectoryStore
from snapd.store.opening import StoreUrl, parsed_url
from tests.support.stores import surroundings

GOOD = {
    "/mnt/tier": StoreUrl("file", path=Path("/mnt/tier")),
    "file:///mnt/a%20b": StoreUrl("file", path=Path("/mnt/a b")),
    "file://localhost/mnt": StoreUrl("file", path=Path("/mnt")),
    "s3://bucket": StoreUrl("s3", bucket="bucket"),
    "s3://bucket/": StoreUrl("s3", bucket="bucket"),
    "s3://bucket/team/run-1/": StoreUrl("s3", bucket="bucket", prefix="team/run-1"),
}
BAD = [
    "", "tier", "./tier", "file://host/tier", "file:tier", "http://host/bucket", "s3://", "s3:///prefix", "s3://b",
    "s3://bucket/a/../b", "s3://bucket/a//b", "s3://bucket/ü", "s3://bucket/" + "x" * 701, "s3://[bucket/x",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_urls(text: str) -> None:
    assert parsed_url(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_what_names_no_store(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed_url(text)
    assert error.value.kind == "store"


@pytest.mark.parametrize(
    "text", ["s3://key:secret@bucket/x", "s3://bucket/x?secret=1", "s3://bucket/x#secret"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed_url(text)
    assert "secret" not in str(error.value) and "AWS" in error.value.hint


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shared": "nowhere"}, "names no store"),
        ({"shared": "/mnt/x", "endpoint": "http://h:1"}, "tier.endpoint is for S3"),
        ({"shared": "s3://bucket", "sse_kms_key": "k"}, "needs tier.sse = kms"),
        ({"shared": "s3://bucket", "endpoint": "host:9000"}, "must begin with http"),
    ],
)
def test_settings_that_do_not_go_together(changed: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_tier(replace(TierConfig(), **changed))
    assert error.value.kind == "store" and words in str(error.value)


def test_without_a_tier_nothing_is_checked() -> None:
    check_tier(TierConfig(endpoint="nonsense"))


def test_from_the_environment_to_the_store(tmp_path: Path) -> None:
    config = load(environ={"SNAPD_TIER_SHARED": str(tmp_path), "SNAPD_TIER_SINGLE_WRITER": "yes"}).config.tier
    store = store_of(config, surroundings())
    assert isinstance(store, DirectoryStore) and store.description == str(tmp_path)
    assert store_options(config).single_writer
    assert store_of(config, surroundings(), url="/another").description == "/another"


@pytest.mark.parametrize(("style", "expected"), [("auto", None), ("yes", True), ("no", False)])
def test_styles(style: str, expected: bool | None) -> None:
    assert store_options(TierConfig(path_style=style)).path_style is expected
