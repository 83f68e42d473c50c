"""What people do with an artifact: continue a prompt, score a text."""
