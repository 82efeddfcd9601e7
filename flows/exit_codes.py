"""What every command of this project ends with."""

DONE = 0
FAILED = 1  # anything that the others do not name
UNUSABLE = 2  # the configuration or the input cannot be used; one line says why
BROKEN_INVARIANT = 3  # an invariant or a blocking check failed
