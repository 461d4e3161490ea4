"""The names of what `fill_rows` reads and changes; without numba, which takes a while to import."""

# Columns of what is known of each source.
TOKENS, OWED, SHARE, LIMIT, BEGUN, QUEUED = range(6)
# Where the stream stands: the source whose document is open (or -1), the tokens of that document
# taken, the tokens of all sources, the token at which the shares change, and of the batch the rows,
# the tokens of its last row, and the pieces that are filled.
OPEN, OFFSET, TOTAL, CHANGE, ROWS, FILLED, PIECES = range(7)
# Why `fill_rows` has stopped.
IS_FULL, NEEDS_ROOM, SHARES_CHANGE, SOURCE_ENDS, NEEDS_DOCUMENTS, ALL_USED_UP = range(6)
