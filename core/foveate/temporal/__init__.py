"""Numbers over frames and tracks: where attention goes in time, what changes, what the answer depends on."""
