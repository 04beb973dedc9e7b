"""What one worker process remembers of its layers, and does before it serves."""
