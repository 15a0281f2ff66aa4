"""Exit statuses of a worker, besides 0."""

BAD_CONFIGURATION = 2  # another start would end the same way
ENGINE_DIED = 70
DATA_PLANE_DIED = 71
SICK = 72  # the self-test failed
