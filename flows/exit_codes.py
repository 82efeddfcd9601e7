"""The exit codes of every command of this project."""

DONE = 0
FAILED = 1  # any other failure
UNUSABLE = 2  # the configuration or the input cannot be used; one line says why
BROKEN_INVARIANT = 3  # an invariant or a blocking check failed
