"""One file that a user copies into an old environment; see docs/video.md."""
