"""Identities as distinct types, so that one is never passed for another.

Unless it says otherwise, each is 32 lower-case hex digits (16 random bytes); names can change, these never do.
"""

from __future__ import annotations

from typing import NewType

VmId = NewType("VmId", str)
PointId = NewType("PointId", str)
PlaceholderId = NewType("PlaceholderId", str)
StoreId = NewType("StoreId", str)
PackId = NewType("PackId", str)
JobId = NewType("JobId", str)

DatastoreId = NewType("DatastoreId", str)
"""Of a backing directory: made with its private directory, and moves with it from host to host."""

WriterId = NewType("WriterId", str)
"""Whoever writes packs and segments, once: 16 hex digits, with which the names of both end."""

ChunkId = NewType("ChunkId", bytes)
"""BLAKE3-256 of a chunk's raw bytes: 32 bytes."""

SegmentId = NewType("SegmentId", str)
"""BLAKE3-256 of a segment's bytes (64 hex digits), and who wrote it: no name is ever used again."""
