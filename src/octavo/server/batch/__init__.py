"""Requests from a file, answered into a file, by the server's own routes: `octavo run-batch` (docs/batch.md)."""
