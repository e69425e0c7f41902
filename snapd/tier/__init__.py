"""A durable tier: packs, manifests and commit records over a store. Formats are in docs/format.md."""
