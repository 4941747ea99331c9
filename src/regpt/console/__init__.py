"""The console: all that is printed passes through here, and no console, reader or disk can end a command by it.

`streams` makes stdout and stderr unfailing, `text` makes names and messages fit to be shown, `lines` prints lines,
tables, notes and JSON, `drawing` has what rich draws: progress bars, coloured cells.
"""
