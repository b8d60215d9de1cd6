"""Reading, preparing and batching of volumes and their texts."""
