"""The audit log: an append-only, signed record of what the server did, in formats that others verify."""
