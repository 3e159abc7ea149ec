"""One module a verb of the command line; each a thin call."""
