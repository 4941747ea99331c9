"""One named, commented file a run; `regpt train NAME` reads it."""
