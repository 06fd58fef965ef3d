"""Images on their way from the bytes of a file to the uint8 tensor that the backbone takes."""
