"""Images with segmentations, learned as a game of three players."""
