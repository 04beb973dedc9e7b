"""From headers to a verdict: what every rank holds and which kernel runs it, or why it cannot."""
