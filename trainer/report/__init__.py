"""A run read back from its folder: verdicts, the HTML page of `keel report`, the terminal view of `keel status`.

Nothing here imports torch or writes to the folder, so looking at a run is quick and never disturbs it.
"""
