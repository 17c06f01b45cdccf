"""One module a route, or a few that belong together; each has a `router`."""
