"""From the bytes of an image file to the uint8 tensor that the backbone takes."""
