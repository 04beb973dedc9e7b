"""A day on a GPU: the steps, how they run, what their results say."""
