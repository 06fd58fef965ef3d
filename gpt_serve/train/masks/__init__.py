"""Training and measuring segmentation: pictures with label files, crops of both, heads with decoders, mIoU."""
