"""The sections ``[store]``, ``[replica]`` and ``[scrub]``: secondary storage, who asks it, and how it is checked."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from vmfs_stub.config.values import AbsolutePath, ByteCount, Section


class _WithCredentials(Section):
    """Of a place that may ask who we are; without, they come from where Amazon's tools look."""

    access_key_id: str = ""
    secret_access_key: str = Field(default="", repr=False)

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError("access_key_id and secret_access_key go together: give both, or neither")
        return self


class StoreConfig(_WithCredentials):
    """Secondary storage, and how patient to be with it."""

    url: str = Field(min_length=1)
    threads: int = Field(default=16, ge=1, le=256)
    retries_max: int = Field(default=3, ge=0, le=100)
    listing_lag_s: float = Field(default=30, ge=0, le=86400)
    key_file: AbsolutePath | None = None
    passphrase_file: AbsolutePath | None = None

    @field_validator("key_file", "passphrase_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _key_is_one(self) -> StoreConfig:
        if self.key_file is not None and self.passphrase_file is not None:
            raise ValueError("key_file or passphrase_file opens the store: give one of them, or neither")
        return self


class ReplicaConfig(_WithCredentials):
    """A second store that holds the same; none without ``url``.  It is asked in the same way as the store."""

    url: str = ""


class ScrubConfig(Section):
    """Checking the store; ``bytes_per_s_max`` of 0 is no limit."""

    bytes_per_s_max: ByteCount = 0
