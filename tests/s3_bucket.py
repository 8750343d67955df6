"""A bucket on the real S3 server that tests share."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.lab.s3_server import S3Account
from vmfs_stub.store.remote import RemoteObjects
from vmfs_stub.store.s3 import S3Credentials, open_s3


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of its own on the S3 server."""

    account: S3Account
    name: str

    def url(self, prefix: str = "") -> str:
        """Its URL, as an operator writes it."""
        return f"s3://{self.name}/{prefix}?endpoint={self.account.endpoint}&region={self.account.region}"

    @property
    def credentials(self) -> S3Credentials:
        return S3Credentials(self.account.access_key_id, self.account.secret_access_key)

    def objects(self, prefix: str = "") -> RemoteObjects:
        """What is in it, without retries."""
        return open_s3(self.url(prefix), self.credentials, timeout_s=20, transfer_timeout_s=60)
