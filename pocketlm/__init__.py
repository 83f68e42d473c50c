"""What people call, read and set: commands, workflow, reports, parameters."""
