"""The audit: what an artifact's results claim, checked by experiment, by recount and by trace."""
