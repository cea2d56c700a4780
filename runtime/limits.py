"""Bounds on everything that comes from outside, used by the command line, gRPC and the session alike."""

MESSAGE_BYTES = 1 << 20  # a gRPC message
DRAFT_NODES = 256  # nodes in one growth
TREE_NODES = 2048  # live nodes of one session's tree
TREE_DEPTH = 64  # tokens that a tree may run ahead of its root
STEP_ROWS = 64  # nodes of one session that a target verifies in one step
SESSIONS = 256  # open at one time on one target or drafter
QUEUE = 1024  # requests that wait for a target
NAME_LENGTH = 256  # characters of the name of a session, a model or a drafter
STOP_STRINGS = 4
STOP_LENGTH = 64  # characters
LOGIT_BIAS = 300  # entries
