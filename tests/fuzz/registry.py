"""All fuzz targets by name."""

from __future__ import annotations

from tests.fuzz import targets_domain, targets_edge, targets_images, targets_primary, targets_sealed, targets_store
from tests.fuzz.target import Target

TARGETS: dict[str, type[Target]] = {
    kind.name: kind
    for kind in (
        targets_primary.RecordTarget,
        targets_primary.ServingMarkTarget,
        targets_primary.VmIdentityTarget,
        targets_primary.DatastoreIdTarget,
        targets_primary.TopModeTarget,
        targets_primary.DurableMapTarget,
        targets_primary.VolatileMapTarget,
        targets_primary.PlaceholderTarget,
        targets_primary.ChangedRecordTarget,
        targets_primary.ChangedMapTarget,
        targets_store.FrameTarget,
        targets_store.PackTarget,
        targets_store.SegmentTarget,
        targets_store.IndexObjectTarget,
        targets_store.DocumentTarget,
        targets_store.PinTarget,
        targets_store.LeaseTarget,
        targets_store.CondemnedTarget,
        targets_store.QuarantineTarget,
        targets_store.MovedTarget,
        targets_store.ClaimTarget,
        targets_store.ForgottenTarget,
        targets_store.ManifestTarget,
        targets_store.RestoreTarget,
        targets_sealed.SealedFrameTarget,
        targets_sealed.SealedObjectTarget,
        targets_sealed.KeyDocumentTarget,
        targets_sealed.SeenStoreTarget,
        targets_edge.ConfigTarget,
        targets_edge.FuseInitTarget,
        targets_edge.ControlRequestTarget,
        targets_edge.ControlReplyTarget,
        targets_edge.CatalogTarget,
        targets_edge.ChunkIndexTarget,
        targets_images.ImageHeaderTarget,
        targets_images.AssociatedTarget,
        targets_domain.DomainXmlTarget,
    )
}
