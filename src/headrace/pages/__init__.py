"""Pages: what reports share: figures and tables as HTML, plain text for terminals, files written whole."""
