"""Bounds on everything that comes from outside, used by the command line, gRPC and the session alike."""

MESSAGE_BYTES = 1 << 20  # a gRPC message
FRAMES_PER_MESSAGE = 256  # of one such message
DRAFT_NODES = 256  # nodes in one growth
TREE_NODES = 2048  # live nodes of one session's tree
TREE_DEPTH = 64  # tokens that a tree may run ahead of its root
STEP_ROWS = 64  # nodes of one session that a target verifies in one step
SESSIONS = 256  # open at one time on one target or drafter
QUEUED_REQUESTS = 1024  # requests that wait for a target
NAME_LENGTH = 256  # characters of the name of a session, a model or a drafter
STOP_STRINGS = 4
STOP_LENGTH = 64  # characters
LOGIT_BIAS = 300  # entries
LOGPROBS = 20  # most likely tokens reported beside each chosen one
CONSTRAINT_BYTES = 16 << 10  # of a JSON schema or a regular expression
SCHEMA_PROPERTIES = 500  # of the objects that may stand at one place of a JSON text
CONSTRAINED_REQUESTS = (
    256  # texts with a constraint at one time on one target; each has a process of its own
)

# Of a gateway's HTTP side
BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 10.0  # from the head of a request to the end of its body, and from a connection to the end of that head
HEADERS = 100  # of one request
HEADER_BYTES = 16 << 10  # all of them and the address together
JSON_DEPTH = 32  # of arrays and objects inside each other
JSON_ITEMS = 10_000  # of one array or object
JSON_VALUES = 100_000  # values of one body
JSON_NUMBER_LENGTH = 64  # characters
CHOICES = 8  # of one prompt
PROMPTS = 8  # of one request
ERROR_ECHO_LENGTH = 64  # characters of what was sent that an error repeats
MAX_DEADLINE_S = 86_400.0  # seconds: the longest that a request may ask for
DEFAULT_MAX_TOKENS = 2048  # of a request that names no maximum
