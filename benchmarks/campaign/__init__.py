"""A day, or a quarter of an hour, on a GPU: the steps, how they run, what their results say."""
