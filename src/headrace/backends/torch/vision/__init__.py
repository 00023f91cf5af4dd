"""What the torch backend makes of images: rows of the decoder."""
